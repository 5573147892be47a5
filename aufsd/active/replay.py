"""At start, compares the table in the journal with the kernel's mounts.

Mounts outlive the daemon. The journal has the counts, but people unmount by hand meanwhile. Where
the two differ, the kernel is right.
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

# how the kernel can differ from what the last daemon left
Difference = Literal["vanished", "appeared", "partial", "foreign", "holder", "remounted"]
DIFFERENCES: tuple[Difference, ...] = get_args(Difference)


class Finding(NamedTuple):
    """One difference, and in words what was done about it."""

    id: LayerId
    kind: Difference
    text: str


class Replayed(NamedTuple):
    """The differences, and the layers that could not be settled, with the reason."""

    findings: list[Finding]
    unsettled: dict[LayerId, Exception]


def replay(table: Table, recorded: dict[LayerId, Entry], backend: Backend) -> Replayed:
    """Set the table from the journal and the kernel, before the first call. Blocking.

    * An entry is kept if its mount is still there, even below another mount.
    * An entry whose mount is gone is dropped, with its references.
    * An entry of a layer that is given out as its content directory is kept.
    * A mount of a layer without an entry counts 1.
    * A mount that aufsd did not make is reported and left alone.
    * A union without all its branches is unmounted. The last daemon was killed between two mount
      calls, and had not given it to anybody.
    * References of processes that have ended are reported. They are kept until the process watch
      puts them.

    A layer that cannot be settled keeps the journal's entry, and `settle` is tried again later.
    Raises OSError if the kernel's table cannot be read.
    """
    store = table.store
    found = Replayed([], {})
    live = observed.rows_at(store.layout)
    for id in {**recorded, **live}:
        entry = recorded.get(id)
        try:
            settled, findings = settle(table, backend, id, entry, live.get(id, []))
        except Exception as error:
            # whatever is wrong with one layer, the daemon starts
            found.unsettled[id] = error
            settled, findings = refs.busy(entry) if entry else None, []
        if settled is not None:
            table.enter(id, settled)
        found.findings.extend(findings)
    table.journal.rewrite(table.entries)
    return found


def settle(
    table: Table, backend: Backend, id: LayerId, recorded: Entry | None, rows: Sequence[Mount]
) -> tuple[Entry | None, list[Finding]]:
    """The entry of a layer, from the journal's entry and the mounts at its mount point.

    Raises OSError, AufsdError if a mount that must not stay cannot be unmounted. Blocking.
    """
    store = table.store
    findings: list[Finding] = []
    if not store.exists(id):
        return None, findings
    entry = None
    if recorded is not None and (recorded.references or recorded.mounted):
        entry = _stands(store.layout, id, recorded, rows)
        if entry is not None:
            entry = refs.busy(entry)
            findings += _ended(id, recorded)
        elif recorded.state is State.MOUNTING or recorded.unmounted:
            entry = _made_again(table, backend, id, recorded, rows)
            done = "could not be yet" if entry.unmounted else "it is now"
            text = f"was about to be mounted again: {done}"
            findings.append(Finding(id, "remounted", text))
        else:
            dropped = len(recorded.references)
            text = f"no longer mounted, {dropped} references dropped"
            findings.append(Finding(id, "vanished", text))
    if rows and (entry is None or not entry.mounted):
        appeared, note = _appeared(table, backend, id, rows[-1])
        entry, findings = appeared or entry, [*findings, note]
    return entry, findings


def _made_again(
    table: Table, backend: Backend, id: LayerId, entry: Entry, rows: Sequence[Mount]
) -> Entry:
    """The entry of a mount that the last daemon had unmounted to mount it again (remount.py)."""
    layout = table.store.layout
    made = observed.uncounted(layout, id, rows[-1]) if rows else None
    if made is not None:
        return refs.mounted_again(entry, made.mount, read_only=made.read_only)
    mount, read_only = None, entry.read_only
    # if the mount fails it is tried again; if the backend is another one, the next `get` mounts it
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
        # an older aufsd wrote no identity: take the mount that is there
        found = observed.uncounted(layout, id, rows[-1])
        return None if found is None else replace(entry, mount=found.mount)
    on_top = observed.is_on_top(layout.mount_point(id), entry)
    return entry if on_top or observed.is_below(rows, entry) else None


def _appeared(
    table: Table, backend: Backend, id: LayerId, row: Mount
) -> tuple[Entry | None, Finding]:
    """A mount without an entry: counted if it is the layer's own, else only reported."""
    store = table.store
    entry = observed.uncounted(store.layout, id, row)
    if entry is None:
        text = f"{row.fstype} that aufsd did not mount is there: left alone"
        return None, Finding(id, "foreign", text)
    if entry.backend == backend.name and id in store.parent:
        union = table.union(id, entry)
        if backend.is_part(union):
            backend.unmount(row.mount_point, flush=False)
            text = "mounted in part when the daemon was killed: unmounted"
            return None, Finding(id, "partial", text)
        if not backend.is_whole(union):
            text = "its branches are not the layer's parents: left alone"
            return None, Finding(id, "foreign", text)
    if not entry.read_only:
        # whoever mounted it may have written to it
        with suppress(MountFailed):
            store.unrecord(id)
    return entry, Finding(id, "appeared", "mounted without an entry: counts 1")


def _ended(id: LayerId, entry: Entry) -> list[Finding]:
    processes = {(ref.pid, ref.start) for ref in entry.references if ref.hold == "process"}
    return [
        Finding(id, "holder", f"process {pid} has ended, its references are put")
        for pid, start in sorted(processes)
        if _has_ended(pid, start)
    ]


def _has_ended(pid: int, start: int) -> bool:
    try:
        return process(pid)[1] != start
    except OSError:  # not known now; the process watch asks again
        return False
