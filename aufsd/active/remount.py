"""Unmounts a layer for a moment and mounts it again. References and path stay the same.

The journal records it before the first system call. If the daemon is killed in between, the next
start mounts the layer again.
"""

from functools import partial

import structlog
from msgspec import to_builtins

from aufsd.active import in_use, observed, performing, refs
from aufsd.active.mounts import Mounts
from aufsd.active.refs import Entry
from aufsd.kernel import copies
from aufsd.kernel import holders as kernel_holders
from aufsd.kernel.mountinfo import Identity
from aufsd.results import Holders
from aufsd.store.ids import LayerId
from aufsd.union import exclusive, helper
from aufsd.union.backend import Union
from aufsd_client.errors import MountFailed, UnmountBusy

log = structlog.get_logger(__name__)


async def unmount(mounts: Mounts, id: LayerId) -> Entry | None:
    """Unmount a layer, for `mount` to mount it again. The caller has begun its transition.

    Returns the entry, which stays in the table. None: the layer was not mounted, or had no
    reference and is not to be mounted again. Raises UnmountBusy, NoSpace: it is mounted as before.
    """
    table = mounts.table
    entry = table.entries.get(id)
    if entry is None or not entry.mounted:
        return None
    moving = refs.replacing(entry)
    table.enter(id, moving)
    table.record(id)
    target = mounts.store.layout.mount_point(id)
    once = partial(performing.unmount, mounts.backend, target, entry, flush=True)
    try:
        await in_use.unmount(
            id, target, once, mounts.thread, mounts.scans, retrying=mounts.retrying
        )
    except BaseException:
        table.enter(id, entry)
        table.record(id)
        raise
    mounts.counters.unmounts += 1
    mounts.busy_errnos.pop(id, None)
    mounts.helpers.forget(id)
    if not entry.references:
        table.leave(id)
        table.record(id)
        return None
    return moving


async def mount(mounts: Mounts, id: LayerId, opaque: frozenset[LayerId]) -> None:
    """Mount again what `unmount` unmounted, over the chain that the index has now.

    Raises MountFailed, TooManyLayers: nothing is mounted, and the entry is as before.
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


def leave_to_next_get(mounts: Mounts, id: LayerId) -> None:
    """Give up mounting it now. Its references stay, and the next `get` mounts it."""
    table = mounts.table
    entry = table.entries[id]
    log.warning("a mount could not be made again; the next get does", id=id)
    table.enter(id, refs.mounted_again(entry, None, read_only=entry.read_only))
    table.record(id)


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
