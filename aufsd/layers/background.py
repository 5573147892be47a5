"""Background work: deletes removed content, and finishes interrupted conversions.

No call waits for it. What fails is tried again (aufsd/tasks.py).
"""

from dataclasses import dataclass, field
from functools import partial

import structlog
import trio

from aufsd.active.table import Table
from aufsd.archive.jobs import Jobs
from aufsd.archive.requests import Branch
from aufsd.store import removal
from aufsd.store.dialect import Dialect
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.store.opened import converting_to
from aufsd.store.recovery import Recovered, discard_trials
from aufsd.store.seals import forget_usage
from aufsd.tasks import AutoResetEvent, Tasks
from aufsd.threads import Disk
from aufsd_client.errors import AufsdError, LayerDamaged

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Upkeep:
    """The background work of a store. `recovered` collects what it has repaired."""

    store: Store
    table: Table
    jobs: Jobs
    disk: Disk
    recovered: list[Recovered]
    tasks: Tasks
    # layers whose conversion was interrupted
    half_converted: set[LayerId] = field(default_factory=set)
    deletion_due: AutoResetEvent = field(default_factory=AutoResetEvent)
    _conversion: AutoResetEvent = field(default_factory=AutoResetEvent)

    async def run(self) -> None:
        """Work at the start, and whenever an event is set. Endless."""
        removals = self.tasks.add("removals", "all removed content is deleted")
        conversions = self.tasks.add("conversions", "no conversion is left half done")
        self.deletion_due.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(removals.repeat, self._delete, wake=self.deletion_due.wait))
            await conversions.until_done(self._look_for_conversions)
            await conversions.repeat(self._finish_conversions, wake=self._conversion.wait)

    # --- deletion -----------------------------------------------------------------------------

    async def _delete(self) -> None:
        # if another store is mounted there meanwhile, nothing of it may be deleted
        self.store.identity.verify()
        left = await self._finish_removals()
        await self.disk.run(discard_trials, self.store)
        undeleted = await self.disk.run(removal.erase_removed, self.store)
        self.store.undeleted = len(undeleted)
        left += [one.error() for one in undeleted.values()]
        if left:
            raise ExceptionGroup("removed content could not be deleted", left)

    async def _finish_removals(self) -> list[OSError]:
        """Move away the rest of layers whose removal was committed but interrupted."""
        left: list[OSError] = []
        try:
            half = await self.disk.run(removal.half_removed, self.store)
        except OSError as error:
            return [error]
        for id in half:
            await self.table.claim(id)
            try:
                # a new layer may have this id by now
                if not self.store.exists(id):
                    left += await self.disk.run(removal.finish_removal, self.store, id)
            finally:
                self.table.end(id)
        return left

    # --- conversions --------------------------------------------------------------------------

    async def convert(self, id: LayerId, to: Dialect) -> bool:
        """Convert a layer that the caller has claimed; False if it was in that dialect already.

        Raises what Jobs.convert raises. Failed or cancelled: the layer is converted back. If that
        fails too, it stays half converted: every reader understands such a layer, and the
        conversion is finished in the background.
        """
        self.store.identity.verify()
        before = await self.disk.run(self.store.dialect, id)
        if before is not to:
            await self.disk.run(forget_usage, self.store, id)
        try:
            return await self.jobs.convert(id, to, await self.disk.run(self._parents, id))
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._bring_back(id, before)
            raise

    def _parents(self, id: LayerId) -> tuple[Branch, ...] | None:
        """The parents of a layer; None if one of them cannot be read."""
        try:
            return tuple(Branch(one, self.store.dialect(one)) for one in self.store.chain(id)[1:])
        except (AufsdError, OSError):
            return None

    async def _bring_back(self, id: LayerId, before: Dialect) -> None:
        try:
            half = await self.disk.run(self._interrupted, id)
            # Without the mark of a conversion, it was not begun, or is done but perhaps not on
            # disk. Converting back does nothing in the first case, and is right in the second.
            if half is not None or await self.disk.run(self.store.dialect, id) is not before:
                await self.jobs.convert(id, before, await self.disk.run(self._parents, id))
        except (AufsdError, OSError) as error:
            log.warning("a conversion is left half done", id=id, error=str(error))
            self.half_converted.add(id)
            self._conversion.set()

    async def _look_for_conversions(self) -> None:
        self.half_converted |= await self.disk.run(self._all_interrupted)
        self._conversion.set()

    async def _finish_conversions(self) -> None:
        failures: list[Exception] = []
        for id in sorted(self.half_converted):
            try:
                await self._finish_conversion(id)
            except (AufsdError, OSError) as error:
                # most likely it is in use; it is read correctly all the same
                failures.append(error)
            else:
                self.half_converted.discard(id)
        if failures:
            raise ExceptionGroup("conversions are half done", failures)

    async def _finish_conversion(self, id: LayerId) -> None:
        if not self.store.exists(id):
            return
        async with self.table.changing(id):
            half = await self.disk.run(self._interrupted, id)
            if half is not None:
                await self.jobs.convert(id, half, await self.disk.run(self._parents, id))
                self.recovered.append(Recovered("finished", "convert", id))
                log.warning("recovered", action="finished", what="convert", name=id)

    def _interrupted(self, id: LayerId) -> Dialect | None:
        return converting_to(self.store.identity, id, self.store.xattr_namespace)

    def _all_interrupted(self) -> set[LayerId]:
        found = set()
        for id in list(self.store.parent):
            try:
                if self._interrupted(id) is not None:
                    found.add(id)
            except (LayerDamaged, OSError):
                continue  # removed meanwhile, or damaged, which `check` reports
        return found
