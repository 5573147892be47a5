"""What a union file system must offer, and how one is chosen.

A backend plans mounts as plain data and runs them; it knows nothing of references, ids on the wire
or archives. Everything here is synchronous and may block: `mounts.py` calls it in the mount thread.
"""

from dataclasses import dataclass
from typing import Protocol

from aufsd.store.layout import Layout
from aufsd.union.branches import MountCall
from aufsd.union.dialect import Dialect


@dataclass(frozen=True, slots=True)
class Union:
    """One union to be mounted: the layer on top, then its parents, nearest first.

    Paths are absolute. `work` is a directory for the file system's own use, on the file system of
    `top`; the backend makes and empties it.
    """

    id: str
    top: str
    lowers: tuple[str, ...]
    target: str
    work: str
    label: str = ""
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a probe found. `reason` is a sentence for a person when it cannot serve.

    `incompatible` tells the store's file system (204) from the kernel or host (203). `facts` are
    things found on the way that `status` and `aufsd probe` show, such as dirperm1 or the limit.
    """

    usable: bool
    reason: str = ""
    incompatible: bool = False
    facts: tuple[tuple[str, str], ...] = ()


class Backend(Protocol):
    """One union file system."""

    @property
    def name(self) -> str:
        """As in the configuration: aufs, overlay."""

    @property
    def dialect(self) -> Dialect:
        """How whiteouts must stand in the branches that it mounts, and how it writes them."""

    @property
    def max_branches(self) -> int:
        """The longest chain, the top branch included."""

    @property
    def live_lower_warning(self) -> str:
        """What to tell who makes a child of a layer that is mounted read-write; "" if harmless."""

    def probe(self, layout: Layout) -> Verdict:
        """Mount for real on the store's own file system, and clean up. Sets what it learnt."""

    def plan(self, union: Union) -> tuple[MountCall, ...]:
        """The mount calls for `union`, in order. Reads branch roots, changes nothing."""

    def mount(self, union: Union) -> None:
        """Run the plan and verify the mount.

        Raises MountFailed with errno, options and the likely cause; then nothing is left mounted.
        """

    def unmount(self, union_target: str) -> None:
        """Flush what must be flushed and unmount once, without MNT_DETACH.

        Raises OSError as umount2(2) does, EBUSY among them; EINVAL means it was no mount point.
        """

    def is_mounted(self, target: str) -> bool:
        """Whether this backend's union is mounted at `target` now: O(1), no mountinfo."""
