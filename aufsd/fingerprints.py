"""What applies recorded of a served store's layers: dropped in time, and compared by `check`."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from aufsd.answers import Problem
from aufsd.archive.fingerprint import problem
from aufsd.archive.jobs import Jobs
from aufsd.archive.requests import Branch
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.table import Table
from aufsd.threads import Disk
from aufsd.union import dialect as dialects
from aufsd_client.errors import InternalError, LayerDamaged, LayerNotFound, LimitExceeded


async def give_out(store: Store, table: Table, disk: Disk, id: LayerId) -> None:
    """Before a layer whose content directory is given to be written to is counted.

    The caller counts it with no await in between: from then on nobody applies to it. A union is
    looked after where it is mounted.
    """
    if store.parent.get(id, id) is None and id not in store.unrecorded:
        await table.claim(id)
        try:
            await disk.run(store.unrecord, id)
        finally:
            table.end(id)


async def compare(
    store: Store, table: Table, disk: Disk, jobs: Jobs, ids: Sequence[LayerId]
) -> list[Problem]:
    """Which of these layers are not what their archives made of them.

    Each is read in a process of its own. One that is mounted writable meanwhile is left out, and
    so is one that is gone; what cannot be read is a problem.
    """
    found = []
    for id in ids:
        with suppress(LayerNotFound, LayerDamaged, OSError):
            async with _read(store, table, disk, id) as (branch, recorded):
                if not recorded:
                    continue
                try:
                    differs = problem(id, recorded, await jobs.fingerprint(branch))
                except (InternalError, LimitExceeded) as error:
                    found.append(Problem(id, "unreadable", error.message, False))
                    continue
                if differs and await disk.run(store.recorded, id) == recorded:
                    found.append(differs)
    return found


@asynccontextmanager
async def _read(
    store: Store, table: Table, disk: Disk, id: LayerId
) -> AsyncIterator[tuple[Branch, str]]:
    async with table.reading((id,)):
        content = store.layout.content(id)
        dialect = await disk.run(dialects.read_dialect, content, store.xattr_namespace)
        yield Branch(id, dialect), await disk.run(store.recorded, id)
