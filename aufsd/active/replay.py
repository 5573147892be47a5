"""At start: the journal's table held against the kernel's.

Mounts outlive the daemon, counts are in the journal, and people unmount by hand: where the two do
not agree the kernel is right.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, NamedTuple, get_args

from msgspec.structs import replace

from aufsd.active import observed, performing, refs
from aufsd.active.in_use import Occupied
from aufsd.active.refs import Entry, State
from aufsd.active.table import Table
from aufsd.kernel.mountinfo import Mount
from aufsd.kernel.peer import process
from aufsd.store.ids import LayerId
from aufsd.store.layout import Layout
from aufsd.union.backend import Backend
from aufsd_client.errors import AufsdError, MountFailed

# what can be otherwise than when the last daemon ended
Difference = Literal["vanished", "appeared", "partial", "foreign", "holder", "remounted"]
DIFFERENCES: tuple[Difference, ...] = get_args(Difference)


class Note(NamedTuple):
    """One thing that did not agree, and in words what was made of it."""

    id: LayerId
    kind: Difference
    text: str


class Replayed(NamedTuple):
    """What did not agree, and which layers could not be settled for what reason."""

    notes: list[Note]
    left: dict[LayerId, Exception]


def replay(table: Table, recorded: dict[LayerId, Entry], backend: Backend) -> Replayed:
    """Set the table from the journal and the kernel, at start; what did not agree.

    An entry stands if the mount that it was made for does, also below another one. Otherwise it
    counts 0 and goes; so does nothing of a layer whose content directory is given out. A mount of
    the layer that no entry knows counts 1. What somebody else mounted there is told and left alone.
    A union that lacks branches, because the last daemon was killed between two mount calls, was
    never given to anybody: it is unmounted. References of processes that have ended are noted, and
    stand until who watches processes puts them. Blocking; called before the first call.

    Of a layer that cannot be settled what the journal says stays; `settle` is for later. Raises
    OSError if the kernel's table cannot be read.
    """
    store = table.store
    found = Replayed([], {})
    live = observed.rows_at(store.layout)
    for id in {**recorded, **live}:
        entry = recorded.get(id)
        try:
            settled, notes = settle(table, backend, id, entry, live.get(id, []))
        except Exception as error:
            # one layer, whatever is wrong with it, ends no start
            found.left[id] = error
            settled, notes = refs.busy(entry) if entry else None, []
        if settled is not None:
            table.enter(id, settled)
        found.notes.extend(notes)
    table.journal.rewrite(table.entries)
    return found


def settle(
    table: Table, backend: Backend, id: LayerId, recorded: Entry | None, rows: Sequence[Mount]
) -> tuple[Entry | None, list[Note]]:
    """The entry that a layer has by the journal and by the rows of its mount point, if any.

    Raises OSError, AufsdError: a mount that has to go stays. Blocking.
    """
    store = table.store
    notes: list[Note] = []
    if not store.exists(id):
        return None, notes
    entry = None
    if recorded is not None and (recorded.references or recorded.mounted):
        entry = _stands(store.layout, id, recorded, rows)
        if entry is not None:
            entry = refs.busy(entry)
            notes += _ended(id, recorded)
        elif recorded.state is State.MOUNTING:
            entry = _made_again(table, backend, id, recorded, rows)
            notes.append(Note(id, "remounted", "was about to be mounted again: it is now"))
        else:
            dropped = len(recorded.references)
            notes.append(Note(id, "vanished", f"no longer mounted, {dropped} references dropped"))
    if rows and (entry is None or not entry.mounted):
        appeared, note = _appeared(table, backend, id, rows[-1])
        entry, notes = appeared or entry, [*notes, note]
    return entry, notes


def _made_again(
    table: Table, backend: Backend, id: LayerId, entry: Entry, rows: Sequence[Mount]
) -> Entry:
    """The entry of a mount that the last daemon took away to make it again (remount.py)."""
    layout = table.store.layout
    made = observed.uncounted(layout, id, rows[-1]) if rows else None
    if made is not None:
        return refs.mounted_again(entry, made.mount, read_only=made.read_only)
    mount, read_only = None, entry.read_only
    # by another backend, or where it fails, the next `get` mounts it
    if entry.backend in (backend.name, refs.BIND) and not rows:
        with suppress(AufsdError, OSError, Occupied):
            union = table.union(id, entry)
            mount, read_only = performing.mount(backend, union, entry.backend)
    return refs.mounted_again(entry, mount, read_only=read_only)


def _stands(layout: Layout, id: LayerId, entry: Entry, rows: Sequence[Mount]) -> Entry | None:
    """The entry of the journal, if its mount is still there."""
    if not entry.mounted:
        return entry
    if not rows:
        return None
    if entry.mount is None:
        # an older aufsd wrote it: what is mounted has to do
        found = observed.uncounted(layout, id, rows[-1])
        return None if found is None else replace(entry, mount=found.mount)
    on_top = observed.is_on_top(layout.mount_point(id), entry)
    return entry if on_top or observed.is_below(rows, entry) else None


def _appeared(table: Table, backend: Backend, id: LayerId, row: Mount) -> tuple[Entry | None, Note]:
    """A mount without an entry: the layer's own is counted, anything else told."""
    store = table.store
    entry = observed.uncounted(store.layout, id, row)
    if entry is None:
        text = f"{row.fstype} that aufsd did not mount is there: left alone"
        return None, Note(id, "foreign", text)
    if entry.backend == backend.name and id in store.parent:
        union = table.union(id, entry)
        if backend.is_part(union):
            backend.unmount(row.mount_point, flush=False)
            text = "mounted in part when the daemon was killed: unmounted"
            return None, Note(id, "partial", text)
        if not backend.is_whole(union):
            text = "its branches are not the layer's parents: left alone"
            return None, Note(id, "foreign", text)
    if not entry.read_only:
        # whoever mounted it may have written to it
        with suppress(MountFailed):
            store.unrecord(id)
    return entry, Note(id, "appeared", "mounted without an entry: counts 1")


def _ended(id: LayerId, entry: Entry) -> list[Note]:
    processes = {(ref.pid, ref.start) for ref in entry.references if ref.hold == "process"}
    return [
        Note(id, "holder", f"process {pid} has ended, its references are put")
        for pid, start in sorted(processes)
        if _has_ended(pid, start)
    ]


def _has_ended(pid: int, start: int) -> bool:
    try:
        return process(pid)[1] != start
    except OSError:  # it cannot be told now; who watches processes asks again
        return False
