"""At start: the journal's table held against the kernel's.

Mounts outlive the daemon, counts are in the journal, and people unmount by hand: where the two do
not agree the kernel is right.
"""

import time

from aufsd import refs
from aufsd.kernel import mountinfo
from aufsd.refs import Entry, Reference, State
from aufsd.store.ids import LayerId, is_id
from aufsd.store.layers import Store
from aufsd.table import Table


def rows_in_kernel(store: Store) -> dict[LayerId, mountinfo.Mount]:
    """The mountinfo rows of the store's mount points: reads all of mountinfo once. Blocking."""
    prefix = f"{store.layout.mnt}/"
    found = {}
    for row in mountinfo.mounted_under(store.layout.mnt):
        name = row.mount_point.removeprefix(prefix)
        if is_id(name):
            found[LayerId(name)] = row
    return found


def replay(table: Table, recorded: dict[LayerId, Entry]) -> list[tuple[LayerId, str]]:
    """Set the table from the journal and the kernel, at start; what did not agree, in words.

    Mounted without an entry counts 1; an entry without a mount counts 0 and goes, but for a layer
    without parents, which is never mounted. Blocking; called before the first call.
    """
    store = table.store
    notes: list[tuple[LayerId, str]] = []
    live = {id: row for id, row in rows_in_kernel(store).items() if id in store.parent}
    for id, entry in recorded.items():
        if id not in store.parent:
            continue
        if entry.union and id not in live:
            notes.append((id, f"no longer mounted, {len(entry.references)} references dropped"))
        elif entry.references or entry.union:
            table.enter(id, refs.busy(entry))
    unknown = Reference(0, 0, "", "manual", time.time(), 0)
    for id, row in live.items():
        if id not in table.entries:
            entry = Entry(
                State.MOUNTED,
                union=True,
                references=(unknown,),
                read_only="ro" in row.options,
                since=time.time(),
                backend=row.fstype,
            )
            table.enter(id, entry)
            notes.append((id, "mounted without an entry: counts 1"))
    table.journal.rewrite(table.entries)
    return notes
