"""btrfs, without unions: a layer is a subvolume, and starts as a snapshot of its parent.

Docker's btrfs driver does the same. The layer holds everything that it shows, so `get` returns its
directory and mounts nothing. The store makes, clones and deletes subvolumes (store/content.py).
Archives find a layer's changes by comparison. A label is set on every inode (archive/relabel.py).
"""

import errno
import os
import re
from dataclasses import dataclass
from typing import Final

from aufsd.kernel import btrfs, syscalls
from aufsd.kernel import probe as host
from aufsd.store.dialect import Dialect, XattrNamespace
from aufsd.store.layout import Layout
from aufsd.union.backend import Union, Verdict
from aufsd.union.branches import MountCall
from aufsd.union.causes import PASSING
from aufsd.union.scratch import scratch_dirs
from aufsd_client.errors import InvalidParams, MountFailed

NAME: Final = "btrfs"
# btrfs has no such limit; a longer parents file helps nobody
_MOST: Final = 32767
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# as docker/go-units reads sizes: binary, whatever the suffix
_SIZE: Final = re.compile(r"([0-9]{1,19})\s*([kmgtp]?)i?b?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Btrfs:
    """The btrfs backend as `probe` found it. Nothing is ever mounted by it."""

    facts: tuple[tuple[str, str], ...] = ()
    name: str = NAME
    dialect: Dialect = Dialect.NONE
    snapshots: bool = True
    node_whiteouts: bool = False
    storage_options: frozenset[str] = frozenset({"size"})
    namespace: XattrNamespace = "trusted"
    max_branches: int = _MOST
    live_lower_warning: str = (
        "the parent is in use and may be written; the new layer will not show that, and its "
        "changes will list it"
    )

    def plan(self, union: Union) -> tuple[MountCall, ...]:
        """As Backend.plan: no call."""
        return ()

    def mount(self, union: Union) -> None:
        """As Backend.mount. Nobody calls it; raises MountFailed."""
        raise MountFailed(f"layer {union.id} is a subvolume and needs no mount", id=union.id)

    def flush(self, target: str) -> None:
        """As Backend.flush: a subvolume is complete by itself."""

    def unmount(self, target: str, *, flush: bool = True) -> None:
        """As Backend.unmount, for a mount that aufsd did not make."""
        syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW)

    def is_mounted(self, target: str) -> bool:
        """As Backend.is_mounted: never."""
        return False

    def is_whole(self, union: Union) -> bool:
        """As Backend.is_whole: never."""
        return False

    def is_part(self, union: Union) -> bool:
        """As Backend.is_part: never."""
        return False

    def helper(self, target: str) -> tuple[int, int] | None:
        """As Backend.helper: the kernel serves it."""
        return None

    def clear(self, target: str) -> bool:
        """As Backend.clear: nothing can die."""
        return False


def probe(layout: Layout) -> Btrfs | Verdict:
    """Make, snapshot and delete trial subvolumes in the store. Raises OSError."""
    os.makedirs(layout.probes, 0o700, exist_ok=True)
    ground = host.ground(layout.probes)
    if ground.magic != syscalls.BTRFS_SUPER_MAGIC:
        return Verdict(f"the store lies on {ground.kind}", incompatible=True)
    if host.in_user_namespace():
        return Verdict("deleting subvolumes and comparing them needs the host's root")
    try:
        with scratch_dirs(layout.probes) as at:
            _try_out(at)
    except OSError as error:
        passing = error.errno in PASSING
        reason = f"subvolumes do not work as they should: {error}"
        return Verdict(reason, incompatible=not passing, passing=passing)
    return Btrfs((("mounts", "none: a layer is a snapshot of its parent"),))


def untried(layout: Layout, _: XattrNamespace) -> Btrfs | Verdict:
    """As `probe`, without a trial: for a store that this has served before."""
    if syscalls.statfs_type(layout.root) != syscalls.BTRFS_SUPER_MAGIC:
        return Verdict("the store lies on another file system", incompatible=True)
    return Btrfs((("mounts", "none: a layer is a snapshot of its parent"),))


def _try_out(at: str) -> None:
    """Do once with subvolumes what the store and archives do."""
    scratch = os.open(at, _DIRECTORY)
    made: list[bytes] = []
    try:
        btrfs.subvol_create(scratch, b"lower")
        made.append(b"lower")
        os.mkdir(f"{at}/lower/d")
        lower = os.open(f"{at}/lower", _DIRECTORY)
        try:
            btrfs.snap_create(scratch, b"upper", lower)
            made.append(b"upper")
            uuid = btrfs.subvol_info(lower).uuid
        finally:
            os.close(lower)
        if os.listdir(f"{at}/upper") != ["d"]:
            raise OSError(errno.ENOTSUP, "a snapshot does not hold what it was made of")
        upper = os.open(f"{at}/upper", _DIRECTORY)
        try:
            items = btrfs.tree_search(upper, (btrfs.TOP, 0, 0), (btrfs.TOP, 1, 0))
            if uuid == btrfs.subvol_info(upper).uuid or not list(items):
                raise OSError(errno.ENOTSUP, "subvolumes do not tell what they are")
        finally:
            os.close(upper)
    finally:
        for name in made:
            btrfs.snap_destroy(scratch, name)
        os.close(scratch)


def parse_size(text: str) -> int:
    """Bytes of a size such as 10G, 512m, 1000: units are powers of 1024. Raises InvalidParams."""
    found = _SIZE.fullmatch(text.strip())
    size = int(found[1]) << 10 * " kmgtp".index((found[2] or " ").lower()) if found else 0
    if not 0 < size < 1 << 63:
        raise InvalidParams(f"storage option size = {text!r}: not a size such as 10G")
    return size
