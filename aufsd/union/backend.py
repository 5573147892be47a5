"""The Protocol that a union file system implements.

A backend plans mounts as plain data and makes them. It knows nothing of references, requests or
archives. Everything here is synchronous and may block. `mounts.py` calls it in the mount thread, so
a backend makes one call at a time. `choice.py` finds a backend that this host can use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from aufsd.store.dialect import Dialect, XattrNamespace
from aufsd.union.branches import MountCall


@dataclass(frozen=True, slots=True)
class Union:
    """A union to mount: the layer on top, then its parents, nearest first.

    Paths are absolute. `work` is a directory for the backend, on the file system of `top`; the
    backend makes and empties it. `opaque_roots` are the branches with an opaque `/`, if the caller
    knows them. None: the backend finds out, if it needs to know.
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
    """Why a backend cannot be used here, as a sentence.

    `incompatible`: because of the store's file system (204), and not of the kernel or host (203).
    `passing`: the next try may succeed, as after a full disk.
    """

    reason: str
    incompatible: bool = False
    passing: bool = False


class NotFlushed(Exception):
    """A mounted union has data outside of its writable branch, which cannot be written there.

    An unmount would lose the data, so the union stays mounted. `error` is the first failure.
    `names` are the first names that would show old content, and `count` is their number; 0 if the
    failure came before any name.
    """

    def __init__(self, error: OSError, names: Sequence[str] = (), count: int = 0) -> None:
        super().__init__(str(error))
        self.error = error
        self.names = tuple(names)
        self.count = count


class Backend(Protocol):
    """One union file system, with what its probe has found out."""

    @property
    def name(self) -> str:
        """The name in the configuration, and the type in mountinfo (without `fuse.`)."""

    @property
    def dialect(self) -> Dialect:
        """The dialect of the whiteouts that it reads and writes."""

    @property
    def snapshots(self) -> bool:
        """Whether a layer is a snapshot of its parent, and not mounted over its parents."""

    @property
    def node_whiteouts(self) -> bool:
        """Whether a device 0:0 in a branch hides a file, even in another dialect."""

    @property
    def storage_options(self) -> frozenset[str]:
        """The keys of `storage_opt` that `create` accepts."""

    @property
    def namespace(self) -> XattrNamespace:
        """The namespace of the dialect's xattrs: `user` in a user namespace."""

    @property
    def max_branches(self) -> int:
        """The longest chain, the top branch included."""

    @property
    def live_lower_warning(self) -> str:
        """The warning about a child of a layer that is mounted read-write; "" if it is harmless."""

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """What the probe has found out, for `status` and `aufsd probe`."""

    def plan(self, union: Union) -> tuple[MountCall, ...]:
        """The mount calls for `union`, in order. Reads branch roots, changes nothing.

        Raises TooManyLayers.
        """

    def mount(self, union: Union) -> None:
        """Make the planned calls and verify the mount. The branches are in the backend's dialect.

        Raises TooManyLayers, or MountFailed with errno, options and the likely cause; then nothing
        is left mounted.
        """

    def flush(self, target: str) -> None:
        """Write all data of a mounted union into its writable branch, which `diff` reads.

        Does nothing if nothing is mounted there. Raises NotFlushed if the branch cannot be written,
        and OSError.
        """

    def unmount(self, target: str, *, flush: bool = True) -> None:
        """Flush, and try to unmount once, without MNT_DETACH.

        Without `flush`, data outside of the branch is lost; that is for a layer that is removed.
        Raises NotFlushed, and then the union stays mounted. Raises OSError as umount2(2) does:
        EBUSY, or EINVAL if nothing is mounted.
        """

    def is_mounted(self, target: str) -> bool:
        """Whether this backend's union is mounted at `target` now: O(1), no mountinfo."""

    def is_whole(self, union: Union) -> bool:
        """Whether the mount there has exactly the union's branches.

        Asked at start, about mounts that are not in the journal.
        """

    def is_part(self, union: Union) -> bool:
        """Whether the mount there has only the first of the union's branches.

        A daemon that was killed between two mount calls leaves such a mount.
        """

    def helper(self, target: str) -> tuple[int, int] | None:
        """The pid and start time of the process that serves the union at `target`; None if none.

        It may be dead. Does not block.
        """

    def clear(self, target: str) -> bool:
        """Detach a union whose helper has died, so that it can be mounted again. Whether it did.

        A union that is alive is not touched.
        """
