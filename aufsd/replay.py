"""At start: the journal's table held against the kernel's.

Mounts outlive the daemon, counts are in the journal, and people unmount by hand: where the two do
not agree the kernel is right.
"""

import time
from contextlib import suppress

from aufsd import refs
from aufsd.kernel import mountinfo
from aufsd.refs import Entry, Reference, State
from aufsd.store.ids import LayerId, is_id
from aufsd.store.layers import Store
from aufsd.table import Table
from aufsd.union.backend import Backend


def rows_in_kernel(store: Store) -> dict[LayerId, mountinfo.Mount]:
    """The mountinfo rows of the store's mount points: reads all of mountinfo once. Blocking."""
    prefix = f"{store.layout.mnt}/"
    found = {}
    for row in mountinfo.mounted_under(store.layout.mnt):
        name = row.mount_point.removeprefix(prefix)
        if is_id(name):
            found[LayerId(name)] = row
    return found


def replay(
    table: Table, recorded: dict[LayerId, Entry], backend: Backend
) -> list[tuple[LayerId, str]]:
    """Set the table from the journal and the kernel, at start; what did not agree, in words.

    Mounted without an entry counts 1; an entry without a mount counts 0 and goes, but for a layer
    without parents, which is never mounted. A union that lacks branches, because the last daemon
    was killed between two mount calls, was never given to anybody: it is unmounted. Blocking;
    called before the first call.
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
    for id, row in live.items():
        if id in table.entries:
            continue
        entry = _found(row)
        if entry.backend == backend.name and not backend.is_whole(table.union(id, entry)):
            backend.unmount(row.mount_point)
            notes.append((id, "mounted in part when the daemon was killed: unmounted"))
            continue
        if not entry.read_only:
            # whoever mounted it may have written to it
            with suppress(OSError):
                store.unrecord(id)
        table.enter(id, entry)
        notes.append((id, "mounted without an entry: counts 1"))
    table.journal.rewrite(table.entries)
    return notes


def _found(row: mountinfo.Mount) -> Entry:
    now = time.time()
    return Entry(
        State.MOUNTED,
        union=True,
        references=(Reference(0, 0, "", "manual", now, 0),),
        read_only="ro" in row.options,
        since=now,
        # fuse.NAME, of a file system that a process serves
        backend=row.fstype.removeprefix("fuse."),
    )
