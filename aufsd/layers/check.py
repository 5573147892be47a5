"""The checks of a served store. What looks wrong is checked again while nobody changes it."""

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
    """Compare layers/, diff/, mnt/ and the kernel's mounts, for one layer or for all."""
    store.identity.verify(writing=repair)
    found = await disk.run(
        store_check.check, store, id=id, repair=False, mounted=set(table.entries)
    )
    # a layer that is being changed may look wrong: check it again in a transition, and repair then
    suspects = sorted({each.id for each in found if each.id and each.problem != "stray-record"})
    whole = store_check.whole(store, repair=repair) if id is None else ()
    found = await disk.run(list[Problem], whole)
    for name in suspects:
        # a name that is no id is claimed too, which harms nobody
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
    """Find names that look like whiteouts and are none, and layers that aufs reads differently.

    Each layer is read in a process of its own. One that cannot be read becomes a problem too.
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
