"""The state machine of one layer's active mount. Pure: it decides, and performs nothing.

    absent --get--> MOUNTING --ok--> ACTIVE(n) --last put--> UNMOUNTING --ok--> absent
                       | failed: as before         ^ busy: ACTIVE(0)   |
                       v                           +-------------------+

A writable layer without parents is not mounted. Its entry has `mounted` false, and only counts.
`mounts.py` performs what is decided here and reports the outcome, in the same task as the system
call and with no await between. So a count changes only together with its mount.
"""

from enum import Enum, StrEnum
from typing import Final, Literal

from msgspec import Struct, field
from msgspec.structs import replace

from aufsd.kernel.mountinfo import Identity

Hold = Literal["manual", "process"]
# as `backend` of an entry (aufsd.union.bind)
BIND: Final = "bind"


class State(StrEnum):
    """The state of an entry. An id without an entry is absent.

    The values, and the name "union" below, are what journals have had since the first one.
    """

    MOUNTING = "mounting"
    ACTIVE = "mounted"
    UNMOUNTING = "unmounting"


class Reference(Struct, frozen=True):
    """One `get` that has not been put.

    `start` is the process's start time in clock ticks since boot (proc_pid_stat(5), field 22):
    with the pid it names a process for good. `since` is seconds since the epoch. A layer has one
    reference of a `name` at the most; "" is no name.
    """

    pid: int
    uid: int
    comm: str
    hold: Hold
    since: float
    start: int
    name: str = ""

    def is_of(self, pid: int, start: int) -> bool:
        """Whether this reference ends with that process."""
        return (self.hold, self.pid, self.start) == ("process", pid, start)


class Entry(Struct, frozen=True):
    """One line of the active-mount table.

    `mounted`: whether aufsd mounts something at the layer's mount point. If false, callers are
    given the content directory. `backend` made the mount; "bind" shows a single layer read-only.
    `asked_read_only`: the first `get` asked for read-only, and the layer may be writable otherwise.
    `mount` identifies the mount. It is None until the mount stands, and in entries that an older
    aufsd wrote.
    `unmounted`: the mount was taken away for a moment and could not be made again yet. Its
    references stand.
    """

    state: State
    mounted: bool = field(name="union")
    references: tuple[Reference, ...] = ()
    label: str = ""
    read_only: bool = False
    since: float = 0.0
    backend: str = ""
    mount: Identity | None = None
    asked_read_only: bool = False
    unmounted: bool = False

    @property
    def stands(self) -> bool:
        """Whether its mount is there, as far as is known."""
        return self.mounted and not self.unmounted


class OnGet(Enum):
    """What a `get` has to do next."""

    WAIT = "the id is in transition: wait for it, ask again"
    COUNT = "only count"
    MOUNT = "mount, then count"
    LABEL_CONFLICT = "mounted with another label"
    MODE_CONFLICT = "given out writable and asked for read-only, or the other way round"


class OnPut(Enum):
    """What a `put` has to do next."""

    WAIT = "the id is in transition: wait for it, ask again"
    NOTHING = "no reference, and nothing mounted"
    COUNT = "drop one reference, others stay"
    UNMOUNT = "drop the last one and unmount"
    REFUSED = "only references of other processes, or with a name, are left"


def on_get(
    entry: Entry | None, *, label: str, live: bool, read_only: bool = False, frozen: bool = False
) -> OnGet:
    """`live`: whether the kernel has it mounted now (true for a layer that is never mounted).

    `frozen`: whether the layer is given out read-only whoever asks.
    """
    if entry is None:
        return OnGet.MOUNT
    if entry.state is not State.ACTIVE:
        return OnGet.WAIT
    if not entry.read_only if read_only else entry.asked_read_only and not frozen:
        return OnGet.MODE_CONFLICT
    if not entry.mounted:
        return OnGet.COUNT
    if not live:
        # unmounted behind our back: mount again, the references stand
        return OnGet.MOUNT
    if entry.backend == BIND:
        # it is the file system that the store lies on, and has no label of its own
        return OnGet.COUNT
    # one superblock has one label; a mount that no one references is still that superblock
    return OnGet.COUNT if entry.label == label else OnGet.LABEL_CONFLICT


def mounting(
    entry: Entry | None, *, label: str, read_only: bool, backend: str, asked_read_only: bool = False
) -> Entry:
    """A mount has been started."""
    return Entry(
        State.MOUNTING,
        mounted=True,
        references=entry.references if entry else (),
        label=label,
        read_only=read_only,
        backend=backend,
        asked_read_only=asked_read_only,
    )


def mounted(entry: Entry, mount: Identity | None, *, read_only: bool, since: float) -> Entry:
    """The mount stands, as the kernel says; nothing has been counted yet."""
    return replace(entry, state=State.ACTIVE, since=since, mount=mount, read_only=read_only)


def replacing(entry: Entry) -> Entry:
    """The mount is about to be made anew, and its references stand: a restart has to see to it."""
    return replace(entry, state=State.MOUNTING)


def mounted_again(entry: Entry, mount: Identity | None, *, read_only: bool) -> Entry:
    """A mount of it stands again; `mount` None: it could not be made, and still has to be."""
    return replace(
        entry, state=State.ACTIVE, mount=mount, read_only=read_only, unmounted=mount is None
    )


def counts(entry: Entry, reference: Reference) -> bool:
    """Whether the reference is one more; not if the entry has one of its name already."""
    return not reference.name or _position_of(entry, reference.name) is None


def counted(entry: Entry, reference: Reference) -> Entry:
    """One reference more."""
    return replace(entry, references=(*entry.references, reference))


def on_put(
    entry: Entry | None, *, pid: int, live: bool, name: str = ""
) -> tuple[OnPut, int | None]:
    """What to do, and where the reference that goes stands in the entry: that of the name, if one
    is given; else the caller's own `process` one, else a manual one without a name.

    `live` is asked of an id without an entry: whether it is mounted now.
    """
    if entry is None:
        # nothing is counted; what the kernel still has mounted there is taken down all the same
        return (OnPut.UNMOUNT, None) if live and not name else (OnPut.NOTHING, None)
    if entry.state is not State.ACTIVE:
        return OnPut.WAIT, None
    at = _position_of(entry, name) if name else _position_to_drop(entry, pid)
    if at is None and name:
        return OnPut.NOTHING, None
    if at is None and entry.references:
        return OnPut.REFUSED, None
    if len(entry.references) > 1:
        return OnPut.COUNT, at
    return OnPut.UNMOUNT, at


def _position_to_drop(entry: Entry, pid: int) -> int | None:
    for at, reference in enumerate(entry.references):
        if reference.pid == pid and reference.hold == "process":
            return at
    # from the end, where with many references the first one looked at will do
    for at in range(len(entry.references) - 1, -1, -1):
        if entry.references[at].hold == "manual" and not entry.references[at].name:
            return at
    return None


def _position_of(entry: Entry, name: str) -> int | None:
    for at, reference in enumerate(entry.references):
        if reference.name == name:
            return at
    return None


def without(entry: Entry, at: int) -> Entry:
    """The entry without the reference at this position."""
    references = entry.references
    return replace(entry, references=references[:at] + references[at + 1 :])


def unmounting(entry: Entry) -> Entry:
    """An unmount has been started; no reference is left, whatever becomes of it."""
    return replace(entry, state=State.UNMOUNTING, references=())


def busy(entry: Entry) -> Entry:
    """The unmount failed: the mount stands, without a reference."""
    return replace(entry, state=State.ACTIVE)
