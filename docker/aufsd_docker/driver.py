"""What each method of the graph driver protocol means in calls of aufsd.

Docker counts: it calls Get again for what it has, and Put as often. Here too, in memory; aufsd sees
one reference for each layer that Docker has, under a name. A dockerd that was killed forgets its
counts without a Put. So at Init what the last one held is set aside: a layer that is got again
keeps its mount (a container may run on it, with `live-restore`), all others are put after a while.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import structlog
import trio

from aufsd_client.errors import AufsdError, LayerInUse, LayerNotFound
from aufsd_client.trio import Client
from aufsd_docker.messages import KINDS, Answer, Arguments, Capabilities, Change

log = structlog.get_logger(__name__)

_PREFIX: Final = "docker:"
# dockerd has restored its containers by then (daemon.restore), one after the other
_SET_ASIDE: Final = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An open descriptor for the client, which stays its owner's."""

    fd: int

    def fileno(self) -> int:
        """The descriptor."""
        return self.fd


@dataclass(slots=True)
class Driver:
    """The graph driver, for one dockerd. `nursery` outlives the calls."""

    client: Client
    nursery: trio.Nursery
    counts: Counter[str] = field(default_factory=Counter)
    # held by a dockerd before this one, and not got since
    left: set[str] = field(default_factory=set)
    # one Get or Put of a layer at a time
    _locks: dict[str, trio.Lock] = field(default_factory=dict)

    # --- the daemon's life --------------------------------------------------------------------

    async def init(self, _: Arguments) -> Answer:
        """A dockerd has started: it holds nothing yet. Its data root is not ours to look at."""
        await self.client.ping()
        self.counts.clear()
        self.left = await self._held()
        if self.left:
            log.info("held by a dockerd before", layers=len(self.left))
            self.nursery.start_soon(self._put_left, frozenset(self.left))
        return Answer()

    async def cleanup(self, _: Arguments) -> Answer:
        """dockerd stops: put what it got, and no more; others may use the store."""
        for id in sorted(await self._held()):
            await self._drop(id)
        self.counts.clear()
        self.left.clear()
        return Answer()

    async def _held(self) -> set[str]:
        rows = (await self.client.mounts()).mounts
        return {
            row.id for row in rows if any(holder.name == _name(row.id) for holder in row.holders)
        }

    async def _put_left(self, ids: frozenset[str]) -> None:
        await trio.sleep(_SET_ASIDE)
        for id in sorted(ids):
            async with self._locks.setdefault(id, trio.Lock()):
                if id in self.left:
                    self.left.discard(id)
                    await self._drop(id)

    async def _drop(self, id: str) -> None:
        """Drop our reference. What stays busy is aufsd's to try again, and is told."""
        try:
            await self.client.put(id, name=_name(id))
        except AufsdError as error:
            log.warning("put", id=id, error=error.message)

    # --- layers -------------------------------------------------------------------------------

    async def create(self, call: Arguments) -> Answer:
        """Create and CreateReadWrite: to aufsd they are the same."""
        made = await self.client.create(
            call.id,
            parent=call.parent or "",
            mount_label=call.mount_label or "",
            storage_opt=call.storage_opt or {},
        )
        for warning in made.warnings:
            log.info("create", id=call.id, warning=warning)
        return Answer()

    async def remove(self, call: Arguments) -> Answer:
        """Remove a layer; one that is not there is removed already. In use: an error."""
        self.left.discard(call.id)
        if not self.counts[call.id]:
            await self.client.put(call.id, name=_name(call.id))
        found = await self.client.remove(call.id, in_use_ok=True)
        if not found.removed and found.reason == "in-use":
            raise LayerInUse(f"layer {call.id} has {found.references} references")
        self._locks.pop(call.id, None)
        return Answer()

    async def get(self, call: Arguments) -> Answer:
        """Mount, or count once more."""
        async with self._locks.setdefault(call.id, trio.Lock()):
            # also when it is counted already: it is mounted again if somebody unmounted it
            found = await self.client.get(
                call.id, mount_label=call.mount_label or "", name=_name(call.id)
            )
            self.left.discard(call.id)
            self.counts[call.id] += 1
        return Answer(directory=found.path)

    async def put(self, call: Arguments) -> Answer:
        """Count down, and unmount at the last. Once too often is harmless."""
        async with self._locks.setdefault(call.id, trio.Lock()):
            if self.counts[call.id] > 1:
                self.counts[call.id] -= 1
                return Answer()
            del self.counts[call.id]
            self.left.discard(call.id)
            await self.client.put(call.id, name=_name(call.id))
        return Answer()

    async def exists(self, call: Arguments) -> Answer:
        """Whether there is such a layer."""
        return Answer(exists=(await self.client.exists(call.id)).exists)

    # --- what there is to know ----------------------------------------------------------------

    async def capabilities(self, _: Arguments) -> Answer:
        """What Docker may leave to us."""
        return Answer(capabilities=Capabilities())

    async def status(self, _: Arguments) -> Answer:
        """The rows that `docker info` shows."""
        rows = (await self.client.status()).status
        return Answer(status=[(str(key), str(value)) for key, value in rows])

    async def metadata(self, call: Arguments) -> Answer:
        """What `docker inspect` shows as GraphDriver.Data; nothing of an unknown layer."""
        try:
            return Answer(metadata=dict((await self.client.get_metadata(call.id)).metadata))
        except LayerNotFound:
            return Answer(metadata={})

    # --- content ------------------------------------------------------------------------------

    async def changes(self, call: Arguments) -> Answer:
        """What `docker diff` shows."""
        found = [
            Change(change.path, KINDS[change.kind])
            async for change in self.client.iter_changes(call.id, parent=call.parent or "")
        ]
        return Answer(changes=found)

    async def diff_size(self, call: Arguments) -> Answer:
        """Bytes of a layer's own files."""
        found = await self.client.diff_size(call.id, parent=call.parent or "")
        return Answer(size=found.size)

    async def diff(self, call: Arguments, out: int) -> None:
        """Write the layer's tar to `out`, which stays the caller's."""
        await self.client.diff(call.id, Descriptor(out), parent=call.parent or "")

    async def apply_diff(self, id: str, parent: str, source: int) -> Answer:
        """Unpack the tar that comes through `source`, which stays the caller's."""
        found = await self.client.apply_diff(id, Descriptor(source), parent=parent)
        for warning in found.warnings:
            log.info("apply_diff", id=id, warning=warning)
        return Answer(size=found.size)


def _name(id: str) -> str:
    return f"{_PREFIX}{id}"
