"""The consistency of a served store: what looks wrong is looked at again with nobody at it."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from aufsd.active.table import Table
from aufsd.archive.jobs import Jobs
from aufsd.archive.requests import Branch
from aufsd.results import Problem
from aufsd.store import check as store_check
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.threads import Disk
from aufsd_client.errors import InternalError, LayerDamaged, LayerNotFound, LimitExceeded


async def consistency(
    store: Store, table: Table, disk: Disk, *, id: LayerId | None, repair: bool
) -> list[Problem]:
    """Hold layers/, diff/, mnt/ and the kernel against each other; of one layer, or of all."""
    store.identity.verify(writing=repair)
    found = await disk.run(
        store_check.check, store, id=id, repair=False, mounted=set(table.entries)
    )
    # what was being changed looked wrong: asked again with nobody at it, and repaired only then
    suspects = sorted({each.id for each in found if each.id and each.problem != "stray-record"})
    whole = store_check.whole(store, repair=repair) if id is None else ()
    found = await disk.run(list[Problem], whole)
    for name in suspects:
        # what has no layer's name is claimed all the same, and nobody else's
        await table.claim(LayerId(name))
        try:
            found += await disk.run(
                store_check.again,
                store,
                name,
                repair=repair,
                mounted=set(table.entries),
            )
        finally:
            table.end(LayerId(name))
    return found


async def content(
    store: Store, table: Table, disk: Disk, jobs: Jobs, ids: Sequence[LayerId]
) -> list[Problem]:
    """Which of the layers hold marks that are none, and which aufs reads otherwise.

    Each is read in a process of its own. One that cannot be read ends no check.
    """
    found: list[Problem] = []

    def branches(chain: Sequence[LayerId]) -> tuple[Branch, ...]:
        return tuple(Branch(id, store.dialect(id)) for id in chain)

    for id in ids:
        with suppress(LayerNotFound, LayerDamaged):
            async with table.reading(partial(_whole_chain, store, id)) as (chain,):
                try:
                    found += await jobs.look_into(await disk.run(branches, chain))
                except (InternalError, LimitExceeded) as error:
                    found.append(Problem(id, "unreadable", error.message, False))
    return found


def _whole_chain(store: Store, id: LayerId) -> tuple[tuple[LayerId, ...], ...]:
    return (store.chain(id),)
