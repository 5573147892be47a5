"""Busy mounts: tries an unmount again for half a second, and names the users in the error.

A union that cannot be unmounted without loss stays mounted; the error says what would be lost.
"""

import errno
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import trio
from msgspec import to_builtins

from aufsd.kernel import holders as kernel_holders
from aufsd.kernel import mountinfo
from aufsd.results import Holder, Holders
from aufsd.store.ids import LayerId
from aufsd.store.layout import Layout
from aufsd.threads import MountThread, Scans
from aufsd.union import exclusive, helper
from aufsd.union.backend import NotFlushed, Union
from aufsd_client.errors import LayerInUse, ModeConflict, MountFailed, NoSpace, UnmountBusy

T = TypeVar("T")

# umount2(2) gives EBUSY for as long as anything has the mount open; moby 57f06409b1 retries so
TRIES = 5
PAUSE = 0.1  # seconds
_FULL = (errno.ENOSPC, errno.EDQUOT)
# mounts whose holders an error names; each look reads all of /proc
_LOOKED_AT = 4


class Covered(Exception):
    """A mount that aufsd did not make covers a layer's mount; `row` is the uppermost."""

    def __init__(self, row: mountinfo.Mount) -> None:
        super().__init__(row.mount_point)
        self.row = row


class Occupied(Exception):
    """A mount that aufsd did not make is where a layer is to be mounted."""


async def mount(
    union: Union,
    once: Callable[[], T],
    thread: MountThread,
    scans: Scans,
    *,
    retrying: Callable[[], None],
) -> T:
    """Call `once` in the mount thread until it mounts. `retrying` is called before another try.

    The branch may be busy for a moment: a process that starts in a mount namespace of its own
    (unshare -m) has a copy of the layer's last mount until it ends. Raises what `once` raises;
    MountFailed for Occupied, and with `holders` if the branch stays busy. Cancelled between two
    tries: nothing is mounted.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return await thread.run(once)
        except Occupied as occupied:
            raise MountFailed(
                f"something that aufsd did not mount is at {union.target}; unmount it first",
                id=union.id,
                errno="EBUSY",
                holders=[],
            ) from occupied
        except MountFailed as failed:
            if failed.data.get("errno") != "EBUSY":
                raise
            busy = failed
        if attempt < TRIES:
            retrying()
            await trio.sleep(PAUSE)
    found = Holders([])
    with suppress(OSError):  # no descriptor left, for one
        found = Holders(await scans.run(_writers, union))
    data = {**busy.data, "holders": _named(found.holders)}
    raise MountFailed(f"{busy.message}: {_words(found)}", **data) from busy


def _writers(union: Union) -> list[Holder]:
    """Who holds the union that was last mounted for a layer, in any mount namespace."""
    served = helper.read(union.work) if helper.is_alive(union.work) else None
    device = served.device if served else exclusive.noted_device(union.work)
    return [] if device is None else kernel_holders.holders_of(device)


async def unmount(
    id: LayerId,
    target: str,
    once: Callable[[], bool],
    thread: MountThread,
    scans: Scans,
    *,
    retrying: Callable[[], None],
) -> bool:
    """Call `once` in the mount thread until it unmounts. `retrying` is called before another try.

    False if it was not mounted any more. `once` raises Covered, NotFlushed, or OSError as
    umount2(2) does. Raises NoSpace if there is no space for what was written in the mount, and
    UnmountBusy, with `errno` and the holders, if it stays mounted for any other reason. Cancelled
    between two tries: it is mounted.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return await thread.run(once)
        except Covered as covered:
            over = f"{covered.row.fstype} that aufsd did not mount is mounted over it at {target}"
            raise UnmountBusy(
                f"layer {id} stays mounted: {over}; unmount that, then put or cleanup",
                id=id,
                errno="EBUSY",
                holders=[],
                kernel=[over],
            ) from covered
        except NotFlushed as failed:
            raise _would_lose(id, failed) from failed
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT) and not _is_mount_point(target):
                return False  # which is what was wanted
            if error.errno != errno.EBUSY:
                raise UnmountBusy(
                    f"layer {id} stays mounted: {error.strerror}; mend that, then put or cleanup",
                    id=id,
                    errno=_name(error),
                    holders=[],
                ) from error
        if attempt < TRIES:
            retrying()
            await trio.sleep(PAUSE)
    try:
        found = await scans.run(kernel_holders.look, target, busy=True)
    except OSError:  # no descriptor left, for one
        found = Holders([])
    raise UnmountBusy(
        f"layer {id} stays mounted, it is busy: {_words(found)}; end what uses it, then put or "
        "cleanup",
        id=id,
        errno="EBUSY",
        holders=_named(found.holders),
        kernel=found.kernel,
    )


def _words(found: Holders) -> str:
    seen = [f"{each.comm} ({each.pid})" for each in found.holders if each.uses]
    if seen or found.kernel:
        return ", ".join((seen + found.kernel)[:5])
    if not found.holders:
        return "nobody could be named"
    perhaps = ", ".join(f"{each.comm} ({each.pid})" for each in found.holders[:5])
    return f"perhaps by a descriptor on its way to {perhaps}"


def _is_mount_point(target: str) -> bool:
    """Whether anything is mounted there: EINVAL may also mean a locked mount (umount(2))."""
    try:
        return mountinfo.is_mount_point(target)
    except FileNotFoundError:
        return False


def _would_lose(id: LayerId, failed: NotFlushed) -> NoSpace | UnmountBusy:
    """The error of a union that stays mounted because its branch is not complete."""
    message = f"layer {id} stays mounted, or it would lose what was written: {_why(failed)}"
    if failed.error.errno in _FULL:
        return NoSpace(f"{message}; free space, then put or cleanup", **_data(id, failed))
    message += "; mend the store's file system, then put or cleanup"
    return UnmountBusy(message, **_data(id, failed), holders=[])


def not_readable(id: LayerId, failed: NotFlushed) -> NoSpace | LayerInUse:
    """The error of a call that reads a mounted layer whose directory is not complete.

    NoSpace on a full disk, else LayerInUse with `errno`.
    """
    message = f"the content of layer {id}, which is mounted, is not whole: {_why(failed)}"
    if failed.error.errno in _FULL:
        return NoSpace(f"{message}; free space, then try again", **_data(id, failed))
    message += "; mend the store's file system, then try again"
    return LayerInUse(message, **_data(id, failed), layers=[id], references=0, holders=[])


def _why(failed: NotFlushed) -> str:
    if not failed.count:
        return str(failed.error.strerror)
    names = ", ".join(failed.names[:3]) + (", ..." if failed.count > 3 else "")
    return f"{failed.count} hard links ({names}) cannot be made, {failed.error.strerror}"


def _data(id: LayerId, failed: NotFlushed) -> dict[str, object]:
    return {
        "id": id,
        "errno": _name(failed.error),
        "names": list(failed.names),
        "count": failed.count,
    }


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))


@dataclass(frozen=True, slots=True)
class HolderLookup:
    """Adds the processes that have a layer's mount open to the `holders` of a LayerInUse.

    Without it the error has only those who counted a reference. As a context manager it does so for
    an error that leaves the block; if it is cancelled meanwhile, the error is lost. One object
    serves every call.
    """

    layout: Layout
    scans: Scans

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, LayerInUse):
            await self.add_to(error)

    async def add_to(self, error: LayerInUse) -> None:
        """Add them. `get` and `put` call this by itself: a context manager costs them too much."""
        # a process that also counted a reference stays one row
        ids, holders = error.data.get("layers"), error.data.get("holders")
        if isinstance(ids, list) and isinstance(holders, list):
            targets = [self.layout.mount_point(id) for id in ids[:_LOOKED_AT]]
            users = await self.scans.run(_users, targets)
            found = {each["pid"]: each for each in users}
            for holder in holders:
                holder.update(found.pop(holder["pid"], {}))
            holders += found.values()


def _users(targets: Sequence[str]) -> list[dict[str, object]]:
    return [each for target in targets for each in _named(kernel_holders.holders(target))]


def _named(found: Sequence[Holder]) -> list[dict[str, object]]:
    return [to_builtins(each) for each in found]


def mode_conflict(id: LayerId, *, read_only: bool) -> ModeConflict:
    """The error of a `get` in another mode than the layer is given out in."""
    now, wanted = ("writable", "read-only") if read_only else ("read-only", "writable")
    return ModeConflict(
        f"layer {id} is in use and given out {now}, so it cannot be had {wanted}: put it first, "
        f"or ask for it {now}",
        id=id,
    )


def not_known(id: LayerId, error: OSError) -> MountFailed:
    """Whether the process that serves a layer's mount lives cannot be told."""
    return MountFailed(
        f"whether layer {id} is mounted still cannot be told: {error.strerror}; try again",
        id=id,
        errno=_name(error),
    )


def not_ours(id: LayerId, target: str) -> UnmountBusy:
    """The error of a mount that aufsd did not make, at a layer's mount point."""
    return UnmountBusy(
        f"something that aufsd did not mount is at {target}; unmount it, then try again",
        id=id,
        errno="EBUSY",
        holders=[],
    )
