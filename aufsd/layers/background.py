"""What goes on in the background: removed content is deleted, what was cut off is finished.

Nothing here is waited for by a call, and nothing that fails here ends the daemon: it is logged, and
tried again later.
"""

from dataclasses import dataclass, field

import structlog
import trio

from aufsd.active.table import Table
from aufsd.archive.jobs import Jobs
from aufsd.store import dialect as dialects
from aufsd.store.dialect import Dialect
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.store.recovery import Recovered
from aufsd.threads import Disk
from aufsd_client.errors import AufsdError

log = structlog.get_logger(__name__)

# what could not be done is tried again after so long, and each time after twice that
SOONEST, LATEST = 0.25, 60.0  # seconds


@dataclass(slots=True)
class Bell:
    """An event for a task that does all there is to do, each time that it is set."""

    _event: trio.Event = field(default_factory=trio.Event)

    def set(self) -> None:
        """There is something to do. Returns at once."""
        self._event.set()

    async def wait(self) -> None:
        """Wait until it is set, and wait for the next time from then on."""
        await self._event.wait()
        self._event = trio.Event()


@dataclass(slots=True)
class Upkeep:
    """Works on the rooms, owns none. `recovered` is where what was finished is told."""

    store: Store
    table: Table
    jobs: Jobs
    disk: Disk
    recovered: list[Recovered]
    # layers with a conversion that is half done
    half_converted: set[LayerId] = field(default_factory=set)
    erase: Bell = field(default_factory=Bell)
    _conversion: Bell = field(default_factory=Bell)

    async def run(self) -> None:
        """Do what there is to do, at start and whenever it is asked for. Endless."""
        self.erase.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._delete)
            nursery.start_soon(self._finish_conversions)

    # --- deletion -----------------------------------------------------------------------------

    async def _delete(self) -> None:
        pause = SOONEST
        while True:
            await self.erase.wait()
            left = await self._finish_removals()
            left += await self.disk.run(self.store.erase_removed)
            for error in left:
                log.warning("removed content could not be deleted", error=str(error))
            pause = await self._again(self.erase, pause, failed=bool(left))

    async def _again(self, bell: Bell, pause: float, *, failed: bool) -> float:
        """Wait before what failed is tried again, unless it is asked for; the next pause."""
        if not failed:
            return SOONEST
        with trio.move_on_after(pause):
            await bell.wait()
        bell.set()
        return min(2 * pause, LATEST)

    async def _finish_removals(self) -> list[OSError]:
        """Move away what is left of layers whose removal was committed."""
        left: list[OSError] = []
        try:
            half = await self.disk.run(self.store.half_removed)
        except OSError as error:
            return [error]
        for id in half:
            await self.table.claim(id)
            try:
                # made anew, it is not ours to take away
                if not self.store.exists(id):
                    left += await self.disk.run(self.store.finish_removal, id)
            finally:
                self.table.end(id)
        return left

    # --- conversions --------------------------------------------------------------------------

    async def convert(self, id: LayerId, to: Dialect) -> bool:
        """Convert a layer that the caller has claimed; False if it was in that dialect already.

        Raises what Jobs.convert raises. Failed or cancelled: the layer is brought back to what it
        was; where not even that can be done it stays half converted, which every reader
        understands, and is finished in the background.
        """
        before = await self.disk.run(self.store.dialect, id)
        try:
            return await self.jobs.convert(id, to)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._bring_back(id, before)
            raise

    async def _bring_back(self, id: LayerId, before: Dialect) -> None:
        try:
            half = await self.disk.run(self._interrupted, id)
            # with no mark it may be whole and not known to last, or not begun: converting back
            # is right for the one and nothing for the other
            if half is not None or await self.disk.run(self.store.dialect, id) is not before:
                await self.jobs.convert(id, before)
        except (AufsdError, OSError) as error:
            log.warning("a conversion is left half done", id=id, error=str(error))
            self.half_converted.add(id)
            self._conversion.set()

    async def _finish_conversions(self) -> None:
        self.half_converted |= await self.disk.run(self._all_interrupted)
        self._conversion.set()
        pause = SOONEST
        while True:
            await self._conversion.wait()
            for id in sorted(self.half_converted):
                try:
                    await self._finish_conversion(id)
                except (AufsdError, OSError) as error:
                    # in use, most likely: then it is read correctly, and was finished for a mount
                    log.warning("a conversion is still half done", id=id, error=str(error))
                else:
                    self.half_converted.discard(id)
            pause = await self._again(self._conversion, pause, failed=bool(self.half_converted))

    async def _finish_conversion(self, id: LayerId) -> None:
        if not self.store.exists(id):
            return
        async with self.table.changing(id):
            half = await self.disk.run(self._interrupted, id)
            if half is not None:
                await self.jobs.convert(id, half)
                self.recovered.append(Recovered("finished", "convert", id))
                log.warning("recovered", action="finished", what="convert", name=id)

    def _interrupted(self, id: LayerId) -> Dialect | None:
        return dialects.interrupted(self.store.layout.content(id), self.store.xattr_namespace)

    def _all_interrupted(self) -> set[LayerId]:
        found = set()
        for id in list(self.store.parent):
            try:
                if self._interrupted(id) is not None:
                    found.add(id)
            except OSError:
                continue  # removed meanwhile, or damaged: `check` tells
        return found
