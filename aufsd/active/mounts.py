"""Performs what the table decides: mounts, unmounts, and counts references.

`refs.py` decides and `table.py` remembers. This module makes the system calls, all of them in the
one mount thread and none under the lock. A count changes right after its system call, in the same
task, with no await between.
"""

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import structlog
import trio

from aufsd.active import in_use, observed, performing, refs
from aufsd.active.counters import Counters
from aufsd.active.refs import Entry, OnGet, OnPut, Reference, State
from aufsd.active.table import Table
from aufsd.active.watch import HelperWatch, ProcessWatch
from aufsd.kernel.mountinfo import Changes
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.store.seals import is_frozen
from aufsd.tasks import Task
from aufsd.threads import MountThread, Scans
from aufsd.union.backend import Backend, NotFlushed
from aufsd_client.errors import (
    AufsdError,
    LabelConflict,
)

log = structlog.get_logger(__name__)


class Dropped(NamedTuple):
    """What a `put` did: the entry that is left, if any, and whether it dropped a reference."""

    entry: Entry | None
    dropped: bool


@dataclass(slots=True)
class Mounts:
    """The mounts of one store. opening.py makes it; layers/access.py has the steps of a `get`."""

    store: Store
    backend: Backend
    table: Table
    nursery: trio.Nursery
    helpers: HelperWatch
    # what again.py could not mount again
    remounts: Task
    thread: MountThread = field(default_factory=MountThread)
    # looks through all processes for the holders of a mount
    scans: Scans = field(default_factory=Scans)
    counters: Counters = field(default_factory=Counters)
    # mounts without a reference that could not be unmounted, with the errno of the last try
    busy_errnos: dict[LayerId, str] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)
    # mounts found in place since the mount table last changed
    _verified: set[LayerId] = field(default_factory=set)
    processes: ProcessWatch = field(init=False)

    def __post_init__(self) -> None:
        self.processes = ProcessWatch(self.table, self.nursery, self.helpers.task, self._put_all)

    # --- get ----------------------------------------------------------------------------------

    def get_now(
        self, id: LayerId, reference: Reference, *, label: str, read_only: bool = False
    ) -> Entry | None:
        """Count one reference, if that takes no waiting. None: nothing was done, use Access.get.

        Raises LayerNotFound, LayerDamaged, LabelConflict, ModeConflict, IncompatibleFilesystem.
        """
        table = self.table
        with table.locked():
            self.store.require(id)
            entry = table.entries.get(id)
            if entry is None or table.in_transition(id) is not None:
                return None
            frozen = entry.asked_read_only and is_frozen(self.store, id)
            live = self._live(id, entry)
            step = refs.on_get(entry, label=label, live=live, read_only=read_only, frozen=frozen)
            if step is OnGet.COUNT:
                return self._count(id, entry, reference)
            if step is OnGet.MODE_CONFLICT:
                raise in_use.mode_conflict(id, read_only=read_only)
            if step is OnGet.LABEL_CONFLICT:
                raise LabelConflict(
                    f"layer {id} is mounted with the label {entry.label!r}; put it first",
                    id=id,
                    label=entry.label,
                )
        return None

    def count_content(
        self, id: LayerId, reference: Reference, *, read_only: bool, asked_read_only: bool = False
    ) -> Entry:
        """Count the first reference to a layer that is given out as its content directory."""
        entry = Entry(
            State.ACTIVE,
            mounted=False,
            read_only=read_only,
            since=time.time(),
            asked_read_only=asked_read_only,
        )
        return self._count(id, entry, reference)

    @asynccontextmanager
    async def mounting(
        self, id: LayerId, *, label: str, read_only: bool, backend: str, asked_read_only: bool
    ) -> AsyncIterator[Entry]:
        """Have an entry in state MOUNTING while the block mounts the layer.

        The caller has begun the transition of the id. While the entry is in the table, nobody
        changes the layer's parents. After an exception or a cancellation the entry is as before.
        """
        table = self.table
        before = table.entries.get(id)
        if before is not None and before.stands:
            self.counters.vanished_mounts += 1
            log.warning("mount vanished", id=id, references=len(before.references))
        entry = refs.mounting(
            before,
            label=label,
            read_only=read_only,
            backend=backend,
            asked_read_only=asked_read_only,
        )
        table.enter(id, entry)
        try:
            yield entry
        except BaseException:
            self.counters.failed_mounts += 1
            if before is None:
                table.leave(id)
            else:
                table.enter(id, before)
            raise

    async def mount(
        self, id: LayerId, entry: Entry, reference: Reference, *, opaque: frozenset[LayerId]
    ) -> Entry:
        """Mount the layer whose entry `mounting` made, and count. `opaque`: see Table.union.

        Raises MountFailed, TooManyLayers; then nothing is left mounted.
        """
        union = self.table.union(id, entry, opaque=opaque)
        once = partial(performing.mount, self.backend, union, entry.backend)
        mount, read_only = await in_use.mount(
            union, once, self.thread, self.scans, retrying=self.retrying_mount
        )
        self.counters.mounts += 1
        self.helpers.watch(id)
        if read_only and not entry.read_only:
            log.warning("the kernel mounted a layer read-only; is the disk full?", id=id)
        mounted = refs.mounted(entry, mount, read_only=read_only, since=time.time())
        return self._count(id, mounted, reference)

    def _count(self, id: LayerId, entry: Entry, reference: Reference) -> Entry:
        # the journal has the entries of the table, and not yet one that was just mounted
        recorded = self.table.entries.get(id) is entry
        more = refs.counts(entry, reference)
        if more:
            entry = refs.counted(entry, reference)
        self.table.enter(id, entry)
        if not recorded:
            self.table.record(id)
        elif more:
            self.table.journal.counted(id, reference, self.table.entries)
        if reference.hold == "process":
            self.processes.watch(reference)
        return entry

    # --- put ----------------------------------------------------------------------------------

    async def put(self, id: LayerId, *, pid: int, name: str = "") -> Dropped:
        """Drop one reference, and unmount if it was the last.

        Raises LayerInUse if the only references left have another process or a name. Raises
        UnmountBusy if the mount is busy, and NoSpace if there is no space for what was written in
        it. After these two, or a cancellation, no reference is left and the mount stands.
        """
        table = self.table
        while True:
            left = self.put_now(id, pid=pid, name=name)
            if left is not None:
                return Dropped(left, True)
            with table.locked():
                entry = table.entries.get(id)
                if not self.store.exists(id):
                    return Dropped(None, False)
                live = entry is None and self.is_mount_point(id)
                step, at = refs.on_put(entry, pid=pid, live=live, name=name)
                waiting = table.in_transition(id)
                if waiting is None:
                    if step is OnPut.NOTHING:
                        return Dropped(entry, False)
                    if step is OnPut.REFUSED:
                        raise table.in_use(id)
                    table.begin(id)
                    break
            await waiting.wait()
        await self.take_down(id)
        return Dropped(None, at is not None)

    def put_now(self, id: LayerId, *, pid: int, name: str = "") -> Entry | None:
        """Drop one reference, if others are left. None: nothing was done, use `put`."""
        table = self.table
        with table.locked():
            entry = table.entries.get(id)
            if entry is None or table.in_transition(id) is not None or not self.store.exists(id):
                return None
            step, at = refs.on_put(entry, pid=pid, live=True, name=name)
            if step is OnPut.COUNT and at is not None:
                return self._drop(id, entry, at)
        return None

    def _drop(self, id: LayerId, entry: Entry, at: int) -> Entry:
        entry = refs.without(entry, at)
        self.table.enter(id, entry)
        self.table.journal.dropped(id, at, self.table.entries)
        return entry

    async def _put_all(self, id: LayerId, pid: int, start: int) -> None:
        """Drop all references of an ended process to one layer."""
        await self._drop_all(id, lambda reference: reference.is_of(pid, start))

    async def take_back(self, id: LayerId, reference: Reference) -> None:
        """Drop a counted reference whose `get` fails after all; nothing if it was not counted."""
        try:
            await self._drop_all(id, lambda other: other is reference)
        except (AufsdError, OSError) as error:
            # `clearing.retry_busy` tries the mount again
            log.warning("put of a reference that was taken back failed", id=id, error=str(error))

    async def _drop_all(self, id: LayerId, is_own: Callable[[Reference], bool]) -> None:
        table = self.table
        while True:
            with table.locked():
                entry = table.entries.get(id)
                references = entry.references if entry else ()
                own = [at for at, reference in enumerate(references) if is_own(reference)]
                waiting = table.in_transition(id)
                if waiting is None:
                    if entry is None or not own:
                        return
                    if len(references) > 1:
                        self._drop(id, entry, own[0])
                        continue
                    table.begin(id)
                    break
            await waiting.wait()
        await self.take_down(id)

    async def take_down(self, id: LayerId) -> bool:
        """As `unmount`, and end the id's transition, which the caller has begun."""
        try:
            return await self.unmount(id)
        finally:
            self.table.end(id)

    async def unmount(self, id: LayerId, *, flush: bool = True) -> bool:
        """Unmount a layer, and drop its entry and references. Whether it was mounted until now.

        The caller has begun the id's transition. A mount that aufsd did not make is left alone. It
        is an error only if it covers the layer's own mount.
        """
        table = self.table
        entry = table.entries.get(id)
        if entry is None:
            # there may be a mount that no entry counts
            entry = await self.thread.run(observed.uncounted_at, self.store.layout, id)
        if entry is None or not entry.mounted:
            if entry is not None:
                table.leave(id)
                table.record(id)
            return False
        table.enter(id, refs.unmounting(entry))
        try:
            target = self.store.layout.mount_point(id)
            once = partial(performing.unmount, self.backend, target, entry, flush=flush)
            was = await in_use.unmount(
                id, target, once, self.thread, self.scans, retrying=self.retrying
            )
        except BaseException as error:
            with table.locked():
                table.enter(id, refs.busy(refs.unmounting(entry)))
                table.record(id)
                data = error.data if isinstance(error, AufsdError) else {}
                self.busy_errnos[id] = str(data.get("errno", ""))
            raise
        with table.locked():
            self.counters.unmounts += 1
            self.busy_errnos.pop(id, None)
            self.helpers.forget(id)
            table.leave(id)
            table.record(id)
        return was

    def retrying(self) -> None:
        """Count one more try of an unmount."""
        self.counters.busy_retries += 1

    def retrying_mount(self) -> None:
        """Count one more try of a mount."""
        self.counters.busy_mounts += 1

    async def flush(self, id: LayerId) -> None:
        """Make the directory of a mounted layer complete, for whoever reads it directly.

        aufs keeps some hard links outside of the branch (union/plink.py). Raises NoSpace,
        LayerInUse: the directory is not complete.
        """
        entry = self.table.entries.get(id)
        if entry and entry.mounted and not entry.read_only and entry.backend == self.backend.name:
            try:
                await self.thread.run(self.backend.flush, self.store.layout.mount_point(id))
            except NotFlushed as failed:
                raise in_use.not_readable(id, failed) from failed

    # --- questions to the kernel --------------------------------------------------------------

    def _live(self, id: LayerId, entry: Entry) -> bool:
        """Whether the entry's own mount is in place, with nothing over it. Does not block.

        The kernel is asked again after any change of the mount table. A mount that a process serves
        is asked about in every tick, because the process may have died.
        """
        tick = self.table.tick
        if id in tick.verified:
            return True
        target = self.store.layout.mount_point(id)
        if self.changes.any():
            self._verified.clear()
        if observed.is_served(entry.backend) and entry.backend == self.backend.name:
            try:
                found = self.backend.is_mounted(target)
            except OSError as error:
                raise in_use.not_known(id, error) from error
        elif not (found := id in self._verified):
            if not entry.mounted:
                # the content directory is there as long as the store is
                self.store.identity.verify(writing=False)
            found = not entry.mounted or observed.is_on_top(target, entry)
            if found:
                self._verified.add(id)
        if found and tick.is_open:
            tick.verified.add(id)
        return found

    def is_mount_point(self, id: LayerId) -> bool:
        """Whether anything, by anybody, is mounted at the layer's mount point. Does not block."""
        return observed.is_mount_point(self.store.layout.mount_point(id))

    async def prove_alive(self) -> None:
        """Return when the lock is free and the mount thread answers. The watchdog waits for it."""
        with self.table.locked():
            pass
        await self.thread.run(os.getpid)
