"""One mount, or one unmount, in the mount thread. Nothing but the entry's own mount is touched."""

import os

import structlog

from aufsd.active import observed
from aufsd.active.in_use import Covered, Occupied
from aufsd.active.refs import BIND, Entry
from aufsd.kernel import mountinfo, syscalls
from aufsd.kernel.mountinfo import Identity
from aufsd.union import bind
from aufsd.union.backend import Backend, Union
from aufsd.union.runner import Vanished
from aufsd_client.errors import MountFailed

log = structlog.get_logger(__name__)

# of a mount that somebody unmounts at once, by hand or in a loop
_TRIES = 3


def mount(backend: Backend, union: Union, by: str) -> tuple[Identity, bool]:
    """Mount a union, by the backend or as "bind". Its identity, and whether it is read-only.

    What somebody unmounts before that can be told is mounted again. Raises Occupied, MountFailed,
    TooManyLayers.
    """
    backend.clear(union.target)
    try:
        foreign = mountinfo.is_mount_point(union.target)
    except FileNotFoundError:
        os.makedirs(union.target, 0o755)
        foreign = False
    if foreign:
        raise Occupied(union.target)
    for _ in range(_TRIES):
        try:
            if by == BIND:
                bind.mount(union)
            else:
                backend.mount(union)
        except Vanished:
            continue
        try:
            read_only = observed.is_read_only(union.target)
        except OSError:  # its helper has just died
            read_only = union.read_only
        # the last thing that is asked: what was asked before is true of this mount
        made = observed.identify(union.target, by)
        if made is not None:
            return made, read_only
    raise MountFailed(
        f"layer {union.id} was mounted {_TRIES} times and somebody else unmounted it at once",
        id=union.id,
        errno="ENODEV",
    )


def unmount(backend: Backend, target: str, entry: Entry, *, flush: bool) -> bool:
    """Unmount the entry's own mount. Whether it was mounted.

    Raises Covered if another mount lies over it, NotFlushed, OSError.
    """
    if not observed.is_on_top(target, entry):
        rows = [row for row in mountinfo.mounted_under(target) if row.mount_point == target]
        if observed.is_below(rows, entry):
            raise Covered(rows[-1])
        log.warning("mount vanished", path=target)
        return False
    if entry.backend == BIND:
        syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW)
    else:
        backend.unmount(target, flush=flush)
    return True
