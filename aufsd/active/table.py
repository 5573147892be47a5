"""The active-mount table behind THE lock: entries, transitions, and the claims of operations.

The lock guards the table. It is never held across an await, so nobody waits for it; if code breaks
that rule, taking it raises. An id is in transition while its layer is mounted, unmounted or
changed. Other calls for the same id wait for the end of the transition, then look again. The
system calls are in `mounts.py`.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field

import trio

from aufsd.active.journal import Journal
from aufsd.active.refs import Entry, State
from aufsd.active.tick import Tick
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.union.backend import Union
from aufsd_client.errors import LayerInUse, ParentNotFound

# how many layers and holders an error names
_NAMED = 20


class _Lock:
    """THE lock. Taking it never waits; it raises if the holder awaits something.

    A trio.Lock has a queue of waiters, which would cost a tenth of a call.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = False

    def __enter__(self) -> None:
        if self._held:
            raise RuntimeError("the table is locked already: its holder awaits something")
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False


@dataclass(slots=True)
class Table:
    """Who uses which layer. Only `enter` and `leave` change `entries`."""

    store: Store
    journal: Journal
    entries: dict[LayerId, Entry] = field(default_factory=dict)
    _lock: _Lock = field(default_factory=_Lock)
    _moving: dict[LayerId, trio.Event] = field(default_factory=dict)
    # jobs that read a layer now
    _read_by: Counter[LayerId] = field(default_factory=Counter)
    # set when no job reads that layer any more
    _unread: dict[LayerId, trio.Event] = field(default_factory=dict)
    tick: Tick = field(init=False)

    def __post_init__(self) -> None:
        self.tick = Tick(self.journal, self.entries)

    def locked(self) -> AbstractContextManager[None]:
        """Lock the table, for a block without an await."""
        return self._lock

    # --- transitions --------------------------------------------------------------------------

    def in_transition(self, *ids: LayerId) -> trio.Event | None:
        """The event to wait for, if one of these ids is in transition; None if none is."""
        for id in ids:
            if id in self._moving:
                return self._moving[id]
        return None

    def begin(self, id: LayerId) -> None:
        """Begin a transition of an id that is in none. The caller must `end` it in any case."""
        self._moving[id] = trio.Event()

    def end(self, id: LayerId) -> None:
        """End the transition, and wake those who wait for it."""
        self._moving.pop(id).set()

    async def claim(self, id: LayerId, refuse: Callable[[LayerId], None] = lambda _: None) -> None:
        """Wait until the id is in no transition, then begin one, unless `refuse` raises.

        Cancelled: nothing was begun.
        """
        while True:
            with self.locked():
                waiting = self.in_transition(id)
                if waiting is None:
                    refuse(id)
                    self.begin(id)
                    return
            await waiting.wait()

    # --- entries ------------------------------------------------------------------------------

    def enter(self, id: LayerId, entry: Entry) -> None:
        """Set an id's entry."""
        self.entries[id] = entry

    def leave(self, id: LayerId) -> None:
        """Take an id's entry out; harmless if there is none."""
        self.entries.pop(id, None)

    def record(self, id: LayerId) -> None:
        """Write the id's entry, or that there is none, to the journal."""
        self.journal.record(id, self.entries.get(id), self.entries)

    def busy(self) -> list[LayerId]:
        """Ids that are mounted without a reference, because the unmount was busy."""
        return [
            id
            for id, entry in self.entries.items()
            # the rarest condition first: health and metrics ask for every entry
            if not entry.references and entry.mounted and entry.state is State.ACTIVE
        ]

    def referenced_by(self, pid: int, start: int) -> list[LayerId]:
        """Ids with a reference that ends with this process."""
        return [
            id
            for id, entry in self.entries.items()
            if any(reference.is_of(pid, start) for reference in entry.references)
        ]

    def union(
        self, id: LayerId, entry: Entry, *, opaque: frozenset[LayerId] | None = None
    ) -> Union:
        """What a backend has to mount for an entry. `opaque`: Union.opaque_roots, as ids."""
        layout = self.store.layout
        return Union(
            id=id,
            top=layout.content(id),
            lowers=tuple(layout.content(parent) for parent in self.store.chain(id)[1:]),
            target=layout.mount_point(id),
            work=layout.work(id),
            label=entry.label,
            read_only=entry.read_only,
            opaque_roots=None if opaque is None else frozenset(map(layout.content, opaque)),
        )

    # --- claims -------------------------------------------------------------------------------

    @asynccontextmanager
    async def creating(self, id: LayerId, parent: LayerId | None) -> AsyncIterator[None]:
        """Claim a new id. It is in the index at once, so the parent cannot be removed meanwhile.

        Raises LayerExists, ParentNotFound, LayerDamaged. After an exception or a cancellation the
        id is free again.
        """
        related = (id,) if parent is None else (id, parent)
        while True:
            with self.locked():
                waiting = self.in_transition(*related)
                if waiting is None:
                    if parent is not None and not self.store.exists(id):
                        if not self.store.exists(parent):
                            raise ParentNotFound(
                                f"there is no layer {parent}", id=id, parent=parent
                            )
                        self.store.require(parent)
                    self.store.register(id, parent)
                    self.begin(id)
                    break
            await waiting.wait()
        try:
            yield
        except BaseException:
            self.store.forget(id)
            raise
        finally:
            self.end(id)

    @asynccontextmanager
    async def changing(self, id: LayerId) -> AsyncIterator[None]:
        """Claim a layer's content for writing.

        Raises LayerNotFound, LayerDamaged. Raises LayerInUse if a job reads it, or if it or a layer
        above it is referenced or mounted.
        """

        def refuse(id: LayerId) -> None:
            self.store.require(id)
            if id in self.entries or self._read_by[id] or self._above(id):
                raise self.in_use(id)

        await self.claim(id, refuse)
        try:
            yield
        finally:
            self.end(id)

    @asynccontextmanager
    async def replacing(
        self, ids: tuple[LayerId, ...], refuse: Callable[[], None]
    ) -> AsyncIterator[None]:
        """Claim layers. The first of them gets new content and a new parent, and may be referenced.

        Waits for jobs that read the first. Then `refuse` is called, and may raise. Raises
        LayerNotFound, LayerDamaged. Cancelled: nothing was begun.
        """
        while True:
            with self.locked():
                waiting = self.in_transition(*ids)
                if waiting is None:
                    self.store.require(ids[0])
                    waiting = self.in_transition(*self.store.chain(ids[0]))
                if waiting is None and self.is_read(ids[0]):
                    waiting = self._unread.setdefault(ids[0], trio.Event())
                if waiting is None:
                    refuse()
                    for id in ids:
                        self.begin(id)
                    break
            await waiting.wait()
        try:
            yield
        finally:
            for id in ids:
                self.end(id)

    @asynccontextmanager
    async def unused(self, id: LayerId) -> AsyncIterator[None]:
        """Claim a layer so that nobody writes to it. It may be read, and layers above it be in use.

        Raises LayerNotFound, LayerDamaged; LayerInUse if it is referenced or mounted.
        """

        def refuse(id: LayerId) -> None:
            self.store.require(id)
            if id in self.entries:
                raise self.in_use(id)

        await self.claim(id, refuse)
        try:
            yield
        finally:
            self.end(id)

    @asynccontextmanager
    async def reading(
        self, which: Callable[[], tuple[tuple[LayerId, ...], ...]]
    ) -> AsyncIterator[tuple[tuple[LayerId, ...], ...]]:
        """Claim layers for reading: none of them is changed, converted or removed meanwhile.

        `which` returns the layers to claim, as chains. It is called again after every wait, because
        a layer may meanwhile have been removed and made again with other parents. Raises what
        `which` raises, LayerNotFound, LayerDamaged.
        """
        while True:
            with self.locked():
                chains = which()
                wanted = tuple({id: None for chain in chains for id in chain})
                waiting = self.in_transition(*wanted)
                if waiting is None:
                    for id in wanted:
                        self.store.require(id)
                    self._read_by.update(wanted)
                    break
            await waiting.wait()
        try:
            yield chains
        finally:
            for id in wanted:
                self._read_by[id] -= 1
                if not self._read_by[id]:
                    del self._read_by[id]
                    if id in self._unread:
                        self._unread.pop(id).set()

    async def wait_unread(self, id: LayerId) -> None:
        """Wait until no job reads the layer. The caller has begun its transition: none starts."""
        while self._read_by[id]:
            await self._unread.setdefault(id, trio.Event()).wait()

    def is_read(self, id: LayerId) -> bool:
        """Whether a job reads the layer now."""
        return self._read_by[id] > 0

    def in_use(self, id: LayerId) -> LayerInUse:
        """The error that says why a layer is in use.

        Its `layers` are those in use: this one, or those above it. Its `holders` have references.
        """
        entry = self.entries.get(id)
        users = [id] if entry or self._read_by[id] else self._above(id)
        references = entry.references if entry else ()
        if references:
            why = f"{len(references)} references to it are left"
        elif self._read_by[id]:
            why = "it is being read"
        elif entry:
            why = "it is mounted"
        else:
            why = f"{len(users)} layers in use stand on it"
        return LayerInUse(
            f"layer {id} is in use: {why}",
            id=id,
            references=len(references),
            layers=users[:_NAMED],
            holders=[
                {"pid": ref.pid, "uid": ref.uid, "comm": ref.comm}
                for user in users[:_NAMED]
                for ref in (self.entries[user].references if user in self.entries else ())
            ][:_NAMED],
        )

    def _above(self, id: LayerId) -> list[LayerId]:
        """Ids with an entry whose layers are above this one.

        They are searched for on demand. A count kept for each layer of a chain would cost every
        mount of a long chain a tenth of its time.
        """
        found: list[LayerId] = []
        below = [id]
        while below:
            children = self.store.children.get(below.pop(), ())
            found += [child for child in children if child in self.entries]
            below.extend(children)
        return found
