"""What the table decides is performed here: mounts, unmounts, and references as they come and go.

`refs.py` decides, `table.py` remembers, this module makes the system calls, all of them in the one
mount thread and none under the lock. A count changes right after the system call that it stands
for, in the same task, with no await between.
"""

import errno
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
from aufsd.threads import MountThread, Scans
from aufsd.union.backend import Backend, NotFlushed
from aufsd_client.errors import (
    AufsdError,
    LabelConflict,
    LayerHasChildren,
    UnmountBusy,
)

log = structlog.get_logger(__name__)

# a mount that stayed busy without a reference is tried again this often, in the background
BUSY_RETRY = 30.0  # seconds


class Dropped(NamedTuple):
    """What a `put` left: the entry, None if there is none; and whether a reference went."""

    entry: Entry | None
    dropped: bool


@dataclass(slots=True)
class Mounts:
    """The mounts of one store, made by opening.py. What a `get` does is in layers/access.py."""

    store: Store
    backend: Backend
    table: Table
    nursery: trio.Nursery
    helpers: HelperWatch
    thread: MountThread = field(default_factory=MountThread)
    # of all processes, for who holds a mount
    scans: Scans = field(default_factory=Scans)
    counters: Counters = field(default_factory=Counters)
    # of those that stay mounted without a reference, with which errno the last try failed
    stays: dict[LayerId, str] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)
    # seen to be there since the mount table changed last
    _seen: set[LayerId] = field(default_factory=set)
    processes: ProcessWatch = field(init=False)

    def __post_init__(self) -> None:
        self.processes = ProcessWatch(self.table, self.nursery, self.helpers.task, self._put_all)

    # --- get ----------------------------------------------------------------------------------

    def get_now(
        self, id: LayerId, reference: Reference, *, label: str, read_only: bool = False
    ) -> Entry | None:
        """Count one reference if that is all there is to do; None if a `get` has to wait.

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
        """Count the first reference to a layer whose content directory is what is given out."""
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
        """Around a mount of an id whose transition the caller holds: its entry meanwhile.

        While it is in the table nobody changes what the layer stands on. Left by an exception or a
        cancellation, the entry is as before.
        """
        table = self.table
        before = table.entries.get(id)
        if before is not None:
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
        """Mount what `mounting` gave an entry, and count; `opaque` as in Table.union.

        Raises MountFailed and TooManyLayers, with nothing left mounted.
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
        # then the journal has it; one that was just mounted is not there yet
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
        """Drop one reference and unmount after the last.

        Raises LayerInUse if only other processes' references, or those with a name, are left;
        UnmountBusy if the mount stays busy, NoSpace if what was written in it cannot be kept: then
        no reference is left and the mount stands. Cancelled: likewise.
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
        await self._take_down(id)
        return Dropped(None, at is not None)

    def put_now(self, id: LayerId, *, pid: int, name: str = "") -> Entry | None:
        """Drop one reference if others are left; None, and nothing is done, in any other case."""
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
        """Drop every reference of an ended process to one layer."""
        await self._drop_all(id, lambda reference: reference.is_of(pid, start))

    async def take_back(self, id: LayerId, reference: Reference) -> None:
        """Drop this very reference, which nobody has been told of, if it was counted."""
        try:
            await self._drop_all(id, lambda other: other is reference)
        except (AufsdError, OSError) as error:
            # the mount is tried again with the busy ones
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
        await self._take_down(id)

    async def _take_down(self, id: LayerId) -> bool:
        """As `_unmount`, of an id whose transition the caller began; end that, however it goes."""
        try:
            return await self._unmount(id)
        finally:
            self.table.end(id)

    async def _unmount(self, id: LayerId, *, flush: bool = True) -> bool:
        """Unmount an id whose transition the caller holds, and drop its entry and references.

        Whether it was mounted until then. What somebody else mounted there is left alone, and no
        error if the layer's own mount is not below it.
        """
        table = self.table
        entry = table.entries.get(id)
        if entry is None:
            # the kernel has something there, and nobody counted it
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
                self.stays[id] = str(data.get("errno", ""))
            raise
        with table.locked():
            self.counters.unmounts += 1
            self.stays.pop(id, None)
            self.helpers.forget(id)
            table.leave(id)
            table.record(id)
        return was

    def retrying(self) -> None:
        """An unmount is tried once more."""
        self.counters.busy_retries += 1

    def retrying_mount(self) -> None:
        """A mount is tried once more."""
        self.counters.busy_mounts += 1

    async def flush(self, id: LayerId) -> None:
        """Have a mounted layer's content complete by itself; nothing to do for any other.

        Raises NoSpace, LayerInUse: it is not complete, and who reads it would not see all.
        """
        entry = self.table.entries.get(id)
        if entry and entry.mounted and not entry.read_only and entry.backend == self.backend.name:
            try:
                await self.thread.run(self.backend.flush, self.store.layout.mount_point(id))
            except NotFlushed as failed:
                raise in_use.not_readable(id, failed) from failed

    # --- what other operations need unmounted -------------------------------------------------

    @asynccontextmanager
    async def removing(self, id: LayerId, *, force: bool) -> AsyncIterator[None]:
        """Claim a layer for removal, unmounted.

        Raises LayerNotFound, LayerHasChildren, LayerInUse (with `references`), UnmountBusy.
        """
        table = self.table

        def refuse(id: LayerId) -> None:
            if id not in self.store.damaged:
                self.store.require(id)
            children = sorted(self.store.children_of(id))
            if children:
                raise LayerHasChildren(
                    f"other layers stand on {id} ({len(children)} in all); remove those first",
                    id=id,
                    children=children[:20],
                )
            entry = table.entries.get(id)
            if (entry and entry.references and not force) or table.is_read(id):
                raise table.in_use(id)

        await table.claim(id, refuse)
        try:
            if id in table.entries or self.is_mount_point(id):
                # its content goes next, and on a full disk that is how to get space
                await self._unmount(id, flush=False)
            if self.is_mount_point(id):
                raise in_use.not_ours(id, self.store.layout.mount_point(id))
            yield
        finally:
            table.end(id)

    async def cleanup(self) -> tuple[list[LayerId], dict[LayerId, AufsdError]]:
        """Unmount every mount of the store, as the kernel has them; what was, and what was not.

        Of a layer whose mount has vanished the references go. So does a mount whose layer is gone;
        one that somebody else made there is told and stays.
        """
        done: list[LayerId] = []
        failed: dict[LayerId, AufsdError] = {}
        found = set(await self.thread.run(observed.rows_at, self.store.layout))
        counted = {id for id, entry in self.table.entries.items() if entry.mounted}
        for id in sorted(found | counted):
            await self.table.claim(id)
            try:
                was = await self._take_down(id)
                if self.is_mount_point(id):
                    raise in_use.not_ours(id, self.store.layout.mount_point(id))
                # not what others unmounted, or mounted, since it was looked for
                done += [id] if was else []
            except AufsdError as error:
                failed[id] = error
            except OSError as error:
                name = errno.errorcode.get(error.errno or 0, "EIO")
                failed[id] = UnmountBusy(f"layer {id}: {error.strerror}", id=id, errno=name)
        return done, failed

    async def retry_busy(self) -> None:
        """Try again, after a while, to unmount what stayed busy with no reference left."""
        await trio.sleep(BUSY_RETRY)
        for id in self.table.busy():
            # it may have been got or moved while another one was tried
            if self.table.in_transition(id) or id not in self.table.busy():
                continue
            self.table.begin(id)
            try:
                await self._take_down(id)
                log.info("busy mount unmounted", id=id)
            except (AufsdError, OSError) as error:
                log.debug("mount is still busy", id=id, error=str(error))

    # --- the kernel's side --------------------------------------------------------------------

    def _live(self, id: LayerId, entry: Entry) -> bool:
        """Whether the entry's own mount is there, and seen. Does not block.

        The kernel is asked again after any change of the mount table. A mount that a process serves
        is asked about in every tick, because the process may have died.
        """
        tick = self.table.tick
        if id in tick.verified:
            return True
        target = self.store.layout.mount_point(id)
        if self.changes.any():
            self._seen.clear()
        if observed.is_served(entry.backend) and entry.backend == self.backend.name:
            try:
                found = self.backend.is_mounted(target)
            except OSError as error:
                raise in_use.not_known(id, error) from error
        elif not (found := id in self._seen):
            if not entry.mounted:
                # the directory that is given out is there as long as the store is
                self.store.identity.verify(writing=False)
            found = not entry.mounted or observed.is_on_top(target, entry)
            if found:
                self._seen.add(id)
        if found and tick.is_open:
            tick.verified.add(id)
        return found

    def is_mount_point(self, id: LayerId) -> bool:
        """Whether anything is mounted at the layer's mount point, whoever did. Does not block."""
        return observed.is_mount_point(self.store.layout.mount_point(id))

    async def breathe(self) -> None:
        """Return once the lock can be taken and the mount thread answers, for the watchdog."""
        with self.table.locked():
            pass
        await self.thread.run(os.getpid)
