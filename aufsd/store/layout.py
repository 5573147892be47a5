"""Where everything of a store lies. Pure: nothing here touches the disk."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from aufsd.store.ids import LayerId

# in `probes`, before the name: what a trial could not delete
TRIAL_LEFT: Final = "left:"


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths under one store's root (design: section 3). `root` is absolute and resolved."""

    root: str

    @property
    def layers(self) -> str:
        """Parents files, as Docker's driver writes them."""
        return f"{self.root}/layers"

    @property
    def diff(self) -> str:
        """Content, one directory a layer."""
        return f"{self.root}/diff"

    @property
    def mnt(self) -> str:
        """Mount points, one directory a layer."""
        return f"{self.root}/mnt"

    @property
    def private(self) -> str:
        """What is aufsd's own; Docker's driver never looks at it."""
        return f"{self.root}/.aufsd"

    @property
    def lock(self) -> str:
        """Held with flock(2) for the daemon's life."""
        return f"{self.root}/.aufsd/lock"

    @property
    def jobs_lock(self) -> str:
        """Held by every process of an archive job, and by who serves the store."""
        return f"{self.root}/.aufsd/jobs"

    @property
    def format(self) -> str:
        """Format and adoption marker."""
        return f"{self.root}/.aufsd/format"

    @property
    def staging(self) -> str:
        """Content on its way in; whatever lies here at start is a crash's."""
        return f"{self.root}/.aufsd/staging"

    @property
    def removing(self) -> str:
        """Removed layers that wait to be deleted."""
        return f"{self.root}/.aufsd/removing"

    @property
    def quarantine(self) -> str:
        """Damaged things that `repair` moved out of the way."""
        return f"{self.root}/.aufsd/quarantine"

    @property
    def probes(self) -> str:
        """Trial mounts of the backends."""
        return f"{self.root}/.aufsd/probes"

    def parents_file(self, id: LayerId) -> str:
        """The commit point of a layer: it exists when this file does."""
        return f"{self.root}/layers/{id}"

    def content(self, id: LayerId) -> str:
        """The layer's own content: the branch."""
        return f"{self.root}/diff/{id}"

    def mount_point(self, id: LayerId) -> str:
        """Where the layer's union is mounted."""
        return f"{self.root}/mnt/{id}"

    def work(self, id: LayerId) -> str:
        """overlayfs's workdir for the layer; on the file system of its upper directory."""
        return f"{self.root}/.aufsd/work/{id}"

    def creation(self, id: LayerId) -> str:
        """The parents file of a layer that is being made: what lies in its place is not one yet."""
        # no id holds a colon: nothing else in there has such a name
        return f"{self.root}/.aufsd/staging/layer:{id}"

    def removal(self, id: LayerId) -> str:
        """The parents file of a layer whose removal is committed and not finished."""
        return f"{self.root}/.aufsd/removing/layer:{id}"

    def marked(self, names: Iterable[str]) -> list[LayerId]:
        """The ids of such files, out of the names in `staging` or `removing`."""
        return [LayerId(name[6:]) for name in sorted(names) if name.startswith("layer:")]
