"""Unmounts for other operations: for `remove`, for `cleanup`, and the retries of busy unmounts."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
import trio

from aufsd.active import in_use, observed
from aufsd.active.mounts import Mounts
from aufsd.store.ids import LayerId
from aufsd_client.errors import AufsdError, LayerHasChildren, UnmountBusy

log = structlog.get_logger(__name__)

# between two tries to unmount what stayed busy without a reference
BUSY_RETRY = 30.0  # seconds


@asynccontextmanager
async def removing(mounts: Mounts, id: LayerId, *, force: bool) -> AsyncIterator[None]:
    """Claim a layer for removal, unmounted.

    Raises LayerNotFound, LayerHasChildren, LayerInUse (with `references`), UnmountBusy.
    """
    table = mounts.table

    def refuse(id: LayerId) -> None:
        if id not in mounts.store.damaged:
            mounts.store.require(id)
        children = sorted(mounts.store.children_of(id))
        if children:
            raise LayerHasChildren(
                f"other layers stand on {id} ({len(children)} in all); remove those first",
                id=id,
                children=children[:20],
            )
        entry = table.entries.get(id)
        if (entry and entry.references and not force) or table.is_read(id):
            raise table.in_use(id)

    await table.claim(id, refuse)
    try:
        if id in table.entries or mounts.is_mount_point(id):
            # The content is deleted next, so nothing is flushed: on a full disk a flush would
            # fail, and the removal is what frees space.
            await mounts.unmount(id, flush=False)
        if mounts.is_mount_point(id):
            raise in_use.not_ours(id, mounts.store.layout.mount_point(id))
        yield
    finally:
        table.end(id)


async def cleanup(mounts: Mounts) -> tuple[list[LayerId], dict[LayerId, AufsdError]]:
    """Unmount every mount of the store that the kernel has. The ids done, and the failures.

    A layer whose mount has vanished loses its references. The mount of a layer that is gone is
    unmounted too. A mount that aufsd did not make stays, and is a failure.
    """
    done: list[LayerId] = []
    failed: dict[LayerId, AufsdError] = {}
    found = set(await mounts.thread.run(observed.rows_at, mounts.store.layout))
    counted = {id for id, entry in mounts.table.entries.items() if entry.mounted}
    for id in sorted(found | counted):
        await mounts.table.claim(id)
        try:
            was = await mounts.take_down(id)
            if mounts.is_mount_point(id):
                raise in_use.not_ours(id, mounts.store.layout.mount_point(id))
            # somebody else may have unmounted it meanwhile
            done += [id] if was else []
        except AufsdError as error:
            failed[id] = error
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "EIO")
            failed[id] = UnmountBusy(f"layer {id}: {error.strerror}", id=id, errno=name)
    return done, failed


async def retry_busy(mounts: Mounts) -> None:
    """After BUSY_RETRY seconds, try to unmount what stayed busy without a reference."""
    await trio.sleep(BUSY_RETRY)
    for id in mounts.table.busy():
        # a `get` may have come while another layer was tried
        if mounts.table.in_transition(id) or id not in mounts.table.busy():
            continue
        mounts.table.begin(id)
        try:
            await mounts.take_down(id)
            log.info("busy mount unmounted", id=id)
        except (AufsdError, OSError) as error:
            log.debug("mount is still busy", id=id, error=str(error))
