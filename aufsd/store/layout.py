"""The paths of a store. Pure: nothing here touches the disk."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from aufsd.store.ids import LayerId

# begins a name in `probes` that a trial could not delete
TRIAL_LEFT: Final = "left:"


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths under one store's root. `root` is absolute and resolved."""

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
        """aufsd's own directory; Docker's driver ignores it."""
        return f"{self.root}/.aufsd"

    @property
    def lock(self) -> str:
        """The daemon locks it with flock(2) while it runs."""
        return f"{self.root}/.aufsd/lock"

    @property
    def jobs_lock(self) -> str:
        """Every process of an archive job has it locked, and the daemon."""
        return f"{self.root}/.aufsd/jobs"

    @property
    def format(self) -> str:
        """Format and adoption marker."""
        return f"{self.root}/.aufsd/format"

    @property
    def staging(self) -> str:
        """Content that is being made. At a start, all in it is left of a crash."""
        return f"{self.root}/.aufsd/staging"

    @property
    def removing(self) -> str:
        """Removed layers that wait to be deleted."""
        return f"{self.root}/.aufsd/removing"

    @property
    def quarantine(self) -> str:
        """Where `repair` moves damaged files."""
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
        """The layer's work directory for overlayfs, on the same file system as its content."""
        return f"{self.root}/.aufsd/work/{id}"

    def creation(self, id: LayerId) -> str:
        """The parents file of a layer that is being made."""
        # no id has a colon, so no other name in there looks so
        return f"{self.root}/.aufsd/staging/layer:{id}"

    def removal(self, id: LayerId) -> str:
        """The parents file of a layer whose removal is committed and not finished."""
        return f"{self.root}/.aufsd/removing/layer:{id}"

    def marked(self, names: Iterable[str]) -> list[LayerId]:
        """The ids of such files, out of the names in `staging` or `removing`."""
        return [LayerId(name[6:]) for name in sorted(names) if name.startswith("layer:")]
