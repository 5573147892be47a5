"""The consistency of a served store: what looks wrong is looked at again with nobody at it."""

from aufsd.answers import Problem
from aufsd.store import check as store_check
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.table import Table
from aufsd.threads import Disk


async def consistency(
    store: Store, table: Table, disk: Disk, *, id: LayerId | None, deep: bool, repair: bool
) -> list[Problem]:
    """Hold layers/, diff/, mnt/ and the kernel against each other; of one layer, or of all."""
    found = await disk.run(
        store_check.check, store, id=id, deep=deep, repair=False, mounted=set(table.entries)
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
                deep=deep,
                repair=repair,
                mounted=set(table.entries),
            )
        finally:
            table.end(LayerId(name))
    return found
