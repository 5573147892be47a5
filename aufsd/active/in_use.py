"""What may be in use: an unmount is tried again for a moment, a refusal names who uses it."""

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from aufsd.kernel import holders as kernel_holders
from aufsd.results import Holder
from aufsd.store.ids import LayerId
from aufsd.store.layout import Layout
from aufsd.threads import Disk, MountThread
from aufsd.union.backend import Backend
from aufsd_client.errors import LayerInUse, UnmountBusy

# umount2(2) gives EBUSY for as long as anything has the mount open; moby 57f06409b1 retries so
TRIES = 5
PAUSE = 0.1  # seconds
# mounts whose users are looked for when a layer is refused: each time all of /proc is read
_LOOKED_AT = 4
# one at a time, so that whoever is refused again and again keeps no other thread busy
_looking = trio.CapacityLimiter(1)


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
        holders=_named(found),
    )


@dataclass(frozen=True, slots=True)
class Naming:
    """Around what may be refused: a LayerInUse names who has the mounts open, not only who counted.

    Cancelled meanwhile: the error is not raised. One object serves every call.
    """

    layout: Layout
    disk: Disk

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, LayerInUse):
            await self.name(error)

    async def name(self, error: LayerInUse) -> None:
        """Put in who has the mounts open; by itself for get and put, to whom a block costs much."""
        # who counted as well comes once, with its `uses`
        ids, holders = error.data.get("layers"), error.data.get("holders")
        if isinstance(ids, list) and isinstance(holders, list):
            targets = [self.layout.mount_point(id) for id in ids[:_LOOKED_AT]]
            async with _looking:
                users = await self.disk.run(_users, targets)
            found = {each["pid"]: each for each in users}
            for holder in holders:
                holder.update(found.pop(holder["pid"], {}))
            holders += found.values()


def _users(targets: Sequence[str]) -> list[dict[str, object]]:
    return [each for target in targets for each in _named(kernel_holders.holders(target))]


def _named(found: Sequence[Holder]) -> list[dict[str, object]]:
    return [{"pid": each.pid, "comm": each.comm, "uses": each.uses} for each in found]
