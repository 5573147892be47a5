"""At start: the journal's table held against the kernel's.

Mounts outlive the daemon, counts are in the journal, and people unmount by hand: where the two do
not agree the kernel is right.
"""

import time
from contextlib import suppress
from typing import Literal, NamedTuple, get_args

from aufsd.active import refs
from aufsd.active.refs import Entry, Reference, State
from aufsd.active.table import Table
from aufsd.kernel import mountinfo
from aufsd.kernel.peer import process
from aufsd.store.ids import LayerId, is_id
from aufsd.store.layers import Store
from aufsd.union.backend import Backend
from aufsd_client.errors import MountFailed

# what can be otherwise than when the last daemon ended
Difference = Literal["vanished", "appeared", "partial", "holder"]
DIFFERENCES: tuple[Difference, ...] = get_args(Difference)


class Note(NamedTuple):
    """One thing that did not agree, and in words what was made of it."""

    id: LayerId
    kind: Difference
    text: str


def rows_in_kernel(store: Store) -> dict[LayerId, mountinfo.Mount]:
    """The mountinfo rows of the store's mount points: reads all of mountinfo once. Blocking."""
    prefix = f"{store.layout.mnt}/"
    found = {}
    for row in mountinfo.mounted_under(store.layout.mnt):
        name = row.mount_point.removeprefix(prefix)
        if is_id(name):
            found[LayerId(name)] = row
    return found


def replay(table: Table, recorded: dict[LayerId, Entry], backend: Backend) -> list[Note]:
    """Set the table from the journal and the kernel, at start; what did not agree.

    Mounted without an entry counts 1; an entry without a mount counts 0 and goes, but for a layer
    without parents, which is never mounted. A union that lacks branches, because the last daemon
    was killed between two mount calls, was never given to anybody: it is unmounted. References of
    processes that have ended are noted, and stand until who watches processes puts them. Blocking;
    called before the first call.
    """
    store = table.store
    notes: list[Note] = []
    live = {id: row for id, row in rows_in_kernel(store).items() if id in store.parent}
    for id, entry in recorded.items():
        if id not in store.parent:
            continue
        if entry.union and id not in live:
            dropped = len(entry.references)
            notes.append(Note(id, "vanished", f"no longer mounted, {dropped} references dropped"))
        elif entry.references or entry.union:
            table.enter(id, refs.busy(entry))
            notes += _ended(id, entry)
    for id, row in live.items():
        if id in table.entries:
            continue
        entry = _found(row)
        if entry.backend == backend.name and not backend.is_whole(table.union(id, entry)):
            backend.unmount(row.mount_point, flush=False)
            text = "mounted in part when the daemon was killed: unmounted"
            notes.append(Note(id, "partial", text))
            continue
        if not entry.read_only:
            # whoever mounted it may have written to it
            with suppress(MountFailed):
                store.unrecord(id)
        table.enter(id, entry)
        notes.append(Note(id, "appeared", "mounted without an entry: counts 1"))
    table.journal.rewrite(table.entries)
    return notes


def _ended(id: LayerId, entry: Entry) -> list[Note]:
    held = {(ref.pid, ref.start) for ref in entry.references if ref.hold == "process"}
    return [
        Note(id, "holder", f"process {pid} has ended, its references are put")
        for pid, start in sorted(held)
        if process(pid)[1] != start
    ]


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
