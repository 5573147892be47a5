"""Compares layers with the fingerprints that applies have recorded, for `check`."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from aufsd.active.table import Table
from aufsd.archive.fingerprint import problem
from aufsd.archive.jobs import Jobs
from aufsd.archive.requests import Branch
from aufsd.results import Problem
from aufsd.store.dialect import Dialect
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.threads import Disk
from aufsd_client.errors import InternalError, LayerDamaged, LayerNotFound, LimitExceeded


async def compare(
    store: Store, table: Table, disk: Disk, jobs: Jobs, ids: Sequence[LayerId]
) -> list[Problem]:
    """The layers that have changed since their apply, or cannot be read.

    Each is read in a process of its own, without a claim. What looks wrong is read again under a
    claim. A layer that is mounted writable or removed meanwhile is left out.
    """
    found = []
    for id in ids:
        with suppress(LayerNotFound, LayerDamaged, OSError):
            if await _differs(store, disk, jobs, id):
                async with table.reading(partial(_alone, id)):
                    differs = await _differs(store, disk, jobs, id)
                found += [] if differs is None else [differs]
    return found


async def _differs(store: Store, disk: Disk, jobs: Jobs, id: LayerId) -> Problem | None:
    """What is wrong with one layer; None for nothing, or if it has no record."""
    recorded, dialect = await disk.run(_look_up, store, id)
    if not recorded:
        return None
    try:
        differs = problem(id, recorded, await jobs.fingerprint(Branch(id, dialect)))
    except (InternalError, LimitExceeded) as error:
        differs = Problem(id, "unreadable", error.message, False)
    # if it was mounted meanwhile, the record is gone and writes are no fault
    return differs if differs and await disk.run(store.recorded, id) == recorded else None


def _look_up(store: Store, id: LayerId) -> tuple[str, Dialect]:
    return store.recorded(id), store.dialect(id)


def _alone(id: LayerId) -> tuple[tuple[LayerId, ...], ...]:
    return ((id,),)
