"""Unmounts a layer for a moment and mounts it again. References and path stay the same.

The journal records it before the first system call. If the daemon is killed in between, the next
start mounts the layer again. What cannot be mounted again is tried until it can.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import structlog
import trio
from msgspec import to_builtins

from aufsd.active import in_use, observed, performing, refs
from aufsd.active.mounts import Mounts
from aufsd.active.refs import Entry, State
from aufsd.kernel import copies
from aufsd.kernel import holders as kernel_holders
from aufsd.kernel.mountinfo import Identity
from aufsd.results import Holders
from aufsd.store.ids import LayerId
from aufsd.tasks import SOONEST
from aufsd.union import exclusive, helper
from aufsd.union.backend import Union
from aufsd_client.errors import AufsdError, MountFailed, UnmountBusy

log = structlog.get_logger(__name__)


class Unmounted(NamedTuple):
    """The entry of the unmounted layer, which stays in the table, and whether the union has ended.

    There is no entry if the layer was not mounted, or had no reference and is not to be mounted
    again. A union that has not ended may be alive in another mount namespace.
    """

    entry: Entry | None
    ended: bool


async def unmount(mounts: Mounts, id: LayerId) -> Unmounted:
    """Unmount a layer, for `mount` to mount it again. The caller has begun its transition.

    Raises UnmountBusy, NoSpace; then it is mounted as before.
    """
    table = mounts.table
    entry = table.entries.get(id)
    if entry is None or not entry.mounted:
        return Unmounted(None, entry is None)
    moving = refs.replacing(entry)
    table.enter(id, moving)
    table.record(id)
    target = mounts.store.layout.mount_point(id)
    work = mounts.store.layout.work(id)
    ended = False

    def once() -> bool:
        nonlocal ended
        was = performing.unmount(mounts.backend, target, entry, flush=True)
        # at once, because the next mounted file system may get the same device number
        with suppress(OSError):
            ended = not (helper.is_alive(work) or exclusive.may_live(work))
        if ended:
            exclusive.forget(work)
        return was

    try:
        await in_use.unmount(
            id, target, once, mounts.thread, mounts.scans, retrying=mounts.retrying
        )
    except BaseException as error:
        # a step after the system call may have failed; then the mount is gone
        if not entry.references or entry.mount is None or observed.is_on_top(target, entry):
            table.enter(id, entry)
            table.record(id)
        else:
            await restore(mounts, id, error)
        raise
    mounts.counters.unmounts += 1
    mounts.busy_errnos.pop(id, None)
    mounts.helpers.forget(id)
    if not entry.references:
        table.leave(id)
        table.record(id)
        return Unmounted(None, ended)
    return Unmounted(moving, ended)


async def mount(mounts: Mounts, id: LayerId, opaque: frozenset[LayerId] | None) -> None:
    """Mount again what `unmount` unmounted, over the chain that the index has now.

    `opaque`: see Table.union. Raises MountFailed, TooManyLayers, OSError; then nothing is mounted,
    and the entry is as before.
    """
    table = mounts.table
    entry = table.entries[id]
    union = table.union(id, entry, opaque=opaque)
    once = partial(performing.mount, mounts.backend, union, entry.backend)
    mount, read_only = await in_use.mount(
        union, once, mounts.thread, mounts.scans, retrying=mounts.retrying_mount
    )
    mounts.counters.mounts += 1
    mounts.helpers.watch(id)
    table.enter(id, refs.mounted_again(entry, mount, read_only=read_only))
    table.record(id)


async def restore(
    mounts: Mounts,
    id: LayerId,
    why: BaseException,
    *,
    first: Callable[[], Awaitable[object]] | None = None,
) -> bool:
    """Mount a layer again as it was before. Whether it worked. If not, it is tried in the
    background.

    `why` is what went wrong, for the log. `first` has to be done before the mount.
    """
    entry = mounts.table.entries.get(id)
    try:
        if first is not None:
            await first()
        if entry is not None and entry.state is State.MOUNTING:
            await mount(mounts, id, None)
            log.warning("a mount was made again after an error", id=id, error=str(why))
    except (AufsdError, OSError, RuntimeError) as error:
        _owe(mounts, id, error, first)
        return False
    return True


def _owe(
    mounts: Mounts,
    id: LayerId,
    error: Exception,
    first: Callable[[], Awaitable[object]] | None = None,
) -> None:
    """Give up mounting it now. Its references stay, and it is tried again until it is mounted."""
    table = mounts.table
    entry = table.entries.get(id)
    if entry is not None and entry.state is State.MOUNTING:
        table.enter(id, refs.mounted_again(entry, None, read_only=entry.read_only))
        table.record(id)
    mounts.remounts.failed(id, error)
    mounts.nursery.start_soon(make_up, mounts, id, first)


async def make_up(
    mounts: Mounts, id: LayerId, first: Callable[[], Awaitable[object]] | None = None
) -> None:
    """Mount, as soon as possible, a layer whose entry says `unmounted`."""
    # it has just failed
    await trio.sleep(SOONEST)
    await mounts.remounts.until_done(partial(_made_up, mounts, id, first), id)


async def _made_up(
    mounts: Mounts, id: LayerId, first: Callable[[], Awaitable[object]] | None
) -> None:
    table = mounts.table
    while True:
        with table.locked():
            entry = table.entries.get(id)
            if first is None and (entry is None or not entry.unmounted):
                # it was put meanwhile, or a `get` has mounted it
                return
            chain = mounts.store.chain(id)
            waiting = table.in_transition(*chain)
            if waiting is None:
                table.begin(id)
                break
        await waiting.wait()
    try:
        if first is not None:
            await first()
        if entry is not None and entry.unmounted:
            await mount(mounts, id, None)
            log.info("a mount was made again", id=id)
    finally:
        table.end(id)


async def refuse_if_alive(mounts: Mounts, id: LayerId, entry: Entry) -> None:
    """Raise UnmountBusy if the union is still alive after its unmount, and may write its branch.

    Then it has a copy, most likely in another mount namespace. The layer is mounted again from that
    copy, because no other union can have the branch while this one lives.
    """
    union = mounts.table.union(id, entry)
    mount = await mounts.thread.run(_brought_back, mounts, union, entry)
    if mount is None:
        return
    found = Holders([])
    if isinstance(mount, Identity) and entry.references:
        mounts.table.enter(id, refs.mounted_again(entry, mount, read_only=entry.read_only))
        mounts.table.record(id)
        found = await mounts.scans.run(kernel_holders.look, union.target, busy=True)
    raise UnmountBusy(
        f"the content of layer {id} is still written through a copy of its mount, in another mount "
        "namespace or elsewhere; end what uses that, then try again",
        id=id,
        errno="EBUSY",
        holders=[to_builtins(each) for each in found.holders],
    )


def _brought_back(mounts: Mounts, union: Union, entry: Entry) -> Identity | bool | None:
    """The mount made from a copy; False if that failed; None if no union is alive."""
    if not helper.is_alive(union.work):
        try:
            exclusive.refuse_if_written(union, mounts.store.layout.probes, mounts.backend.namespace)
        except MountFailed:
            pass
        else:
            return None
    if entry.mount is None or not entry.references:
        return False
    if not copies.bring_back(entry.mount.device, union.target):
        return False
    return observed.identify(union.target, entry.backend) or False
