"""Unmounting what may be in use: tried again for a moment, then refused with who uses it."""

import errno
from collections.abc import Callable

import trio

from aufsd.kernel import holders as kernel_holders
from aufsd.store.ids import LayerId
from aufsd.threads import MountThread
from aufsd.union.backend import Backend
from aufsd_client.errors import UnmountBusy

# umount2(2) gives EBUSY for as long as anything has the mount open; moby 57f06409b1 retries so
TRIES = 5
PAUSE = 0.1  # seconds


async def unmount(
    id: LayerId,
    target: str,
    backend: Backend,
    thread: MountThread,
    *,
    retrying: Callable[[], None],
) -> None:
    """Unmount a layer's union in the mount thread; nothing to do where none is mounted.

    `retrying` is told of each further try. Raises UnmountBusy, with the holders, and OSError.
    Cancelled between two tries: it is mounted.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return await thread.run(backend.unmount, target)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return None  # not mounted (any more), which is what was wanted
            if error.errno != errno.EBUSY:
                raise
        if attempt < TRIES:
            retrying()
            await trio.sleep(PAUSE)
    found = await thread.run(kernel_holders.holders, target)
    named = ", ".join(f"{holder.comm} ({holder.pid})" for holder in found[:5])
    raise UnmountBusy(
        f"layer {id} stays mounted, it is busy: {named or 'nobody could be named'}; "
        f"end what uses it, then put or cleanup",
        id=id,
        errno="EBUSY",
        holders=[{"pid": holder.pid, "comm": holder.comm, "uses": holder.uses} for holder in found],
    )
