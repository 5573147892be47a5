"""What a union file system must offer.

A backend plans mounts as plain data and runs them; it knows nothing of references, ids on the wire
or archives. Everything here is synchronous and may block: `mounts.py` calls it in the mount thread,
and nothing of one backend runs twice at a time. `choice.py` finds one that this host can serve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from aufsd.store.dialect import Dialect, XattrNamespace
from aufsd.union.branches import MountCall


@dataclass(frozen=True, slots=True)
class Union:
    """One union to be mounted: the layer on top, then its parents, nearest first.

    Paths are absolute. `work` is a directory for the file system's own use, on the file system of
    `top`; the backend makes and empties it. `opaque_roots` are those branches whose `/` is opaque,
    from a caller that has looked at every branch anyway; None: the backend looks, where it matters.
    """

    id: str
    top: str
    lowers: tuple[str, ...]
    target: str
    work: str
    label: str = ""
    read_only: bool = False
    opaque_roots: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a probe found that a backend cannot serve: a sentence for a person.

    `incompatible` tells the store's file system (204) from the kernel or host (203). `passing`:
    what stood in the way may be gone at the next try, as a full disk may.
    """

    reason: str
    incompatible: bool = False
    passing: bool = False


class NotFlushed(Exception):
    """What a mounted union keeps outside of its writable branch cannot be written there.

    Unmounted, it would lose that, so it stays mounted. `error` is what failed first. `names` are
    the first of those that would show old content, `count` is how many there are; none if it failed
    before any name.
    """

    def __init__(self, error: OSError, names: Sequence[str] = (), count: int = 0) -> None:
        super().__init__(str(error))
        self.error = error
        self.names = tuple(names)
        self.count = count


class Backend(Protocol):
    """One union file system, as its probe found it."""

    @property
    def name(self) -> str:
        """As in the configuration: aufs, overlay. Also its type in mountinfo, behind any `fuse.`"""

    @property
    def dialect(self) -> Dialect:
        """How whiteouts must stand in the branches that it mounts, and how it writes them."""

    @property
    def snapshots(self) -> bool:
        """Whether a layer is a snapshot of its parent; if not, it is mounted over its parents."""

    @property
    def node_whiteouts(self) -> bool:
        """Whether a device 0:0 in a branch reads as a deleted file, whatever its dialect."""

    @property
    def storage_options(self) -> frozenset[str]:
        """The keys of `storage_opt` that `create` understands."""

    @property
    def namespace(self) -> XattrNamespace:
        """Where the xattrs of the dialect live: `user` in a user namespace."""

    @property
    def max_branches(self) -> int:
        """The longest chain, the top branch included."""

    @property
    def live_lower_warning(self) -> str:
        """What to tell who makes a child of a layer that is mounted read-write; "" if harmless."""

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """What the probe learnt, for `status` and `aufsd probe`; dirperm1 among it."""

    def plan(self, union: Union) -> tuple[MountCall, ...]:
        """The mount calls for `union`, in order. Reads branch roots, changes nothing.

        Raises TooManyLayers.
        """

    def mount(self, union: Union) -> None:
        """Run the plan and verify the mount. The branches are in the backend's dialect already.

        Raises TooManyLayers, or MountFailed with errno, options and the likely cause; then nothing
        is left mounted.
        """

    def flush(self, target: str) -> None:
        """Make the writable branch of a mounted union complete by itself, as `diff` reads it.

        Harmless if nothing is mounted there. Raises NotFlushed if the branch cannot be written, and
        OSError.
        """

    def unmount(self, target: str, *, flush: bool = True) -> None:
        """Flush, and unmount once, without MNT_DETACH.

        Without `flush` what the union keeps outside of its branch is lost: for content that is
        removed next. Raises NotFlushed, and then it is mounted; OSError as umount2(2) does: EBUSY,
        or EINVAL for what is no mount point.
        """

    def is_mounted(self, target: str) -> bool:
        """Whether this backend's union is mounted at `target` now: O(1), no mountinfo."""

    def is_whole(self, union: Union) -> bool:
        """Whether what is mounted there has the union's branches, and no others.

        Asked once, at start-up, of what no journal knows.
        """

    def is_part(self, union: Union) -> bool:
        """Whether what is mounted there has the first of the union's branches, and no others.

        A process killed between two mount calls leaves that.
        """

    def helper(self, target: str) -> tuple[int, int] | None:
        """The process that serves the union at `target`, by pid and start time; None if none does.

        It may be dead. Does not block.
        """

    def clear(self, target: str) -> bool:
        """Take away a union whose helper has died, so that it can be mounted anew; whether one was.

        Nothing that is alive is touched.
        """
