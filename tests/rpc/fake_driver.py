"""A driver that keeps layers in a dict: enough of aufsd.driver.Driver to put the edge through."""

import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import trio

from aufsd import results
from aufsd.kernel.peer import Peer
from aufsd.store.dialect import Dialect
from aufsd.store.ids import LayerId
from aufsd_client.errors import InvalidParams, LayerExists, LayerNotFound, ParentNotFound

TAR = b"the bytes of a tar"


@dataclass
class FakeTick:
    """Has every get of a tick buffered until the tick ends, and tells `written` of them then."""

    buffered: list[str] = field(default_factory=list)
    is_open: bool = False
    written: Callable[[list[str]], None] = lambda _: None

    def change(self, what: str) -> None:
        """Something that has to be written down before it is answered."""
        if self.is_open:
            self.buffered.append(what)

    def __enter__(self) -> None:
        self.is_open = True

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        if self.buffered:
            self.written(self.buffered.copy())
        self.buffered.clear()


@dataclass
class FakeDriver:
    """`calls` notes what was called, in order. A layer named `slow...` waits for `go`."""

    parents: dict[str, LayerId | None] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    peers: list[Peer] = field(default_factory=list)
    applied: dict[str, bytes] = field(default_factory=dict)
    go: trio.Event = field(default_factory=trio.Event)
    # what `cleanup` raises
    failure: BaseException | None = None
    tick: FakeTick = field(default_factory=FakeTick)
    running: int = 0
    started: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    thread: int = field(default_factory=threading.get_ident)

    async def until_running(self, wanted: int) -> None:
        """Wait until so many calls are inside the driver."""
        while self.running != wanted:
            await self.started.park()

    async def _work(self, name: str, id: str) -> None:
        self.calls.append(f"{name} {id}")
        self.running += 1
        self.started.unpark_all()
        try:
            if id.startswith("slow"):
                await self.go.wait()
        except trio.Cancelled:
            self.calls.append(f"{name} {id} cancelled")
            raise
        finally:
            self.running -= 1
            self.started.unpark_all()
        self.calls.append(f"{name} {id} done")

    def _require(self, id: str) -> None:
        if id not in self.parents:
            raise LayerNotFound(f"there is no layer {id}", id=id)

    def version(self) -> results.Version:
        return results.Version("0.0", 1, "fake", [])

    def status(self) -> results.Status:
        rows = [("Root Dir", "/nowhere")]
        return results.Status("fake", rows, "fake", "6", len(self.parents), 0, 0, [], [])

    def health(self) -> results.Health:
        return results.Health("ok", [results.HealthCheck("space", "ok", "plenty")])

    def metrics(self) -> results.Metrics:
        return results.Metrics("text/plain", "aufsd_up 1\n")

    def exists(self, id: LayerId) -> results.Exists:
        self.calls.append(f"exists {id}")
        return results.Exists(id in self.parents)

    async def layers(self, *, after: str, limit: int, prefix: str = "") -> results.Layers:
        ids = sorted(id for id in self.parents if id > after and id.startswith(prefix))
        rows = [
            results.LayerRow(id, self.parents[id] or "", 0, 0, False, 1.5, False)
            for id in ids[:limit]
        ]
        return results.Layers(rows, rows[-1].id if len(ids) > limit else "")

    def mounts(self) -> results.MountTable:
        held = [results.Reference(1, 0, "init", "manual", 1.5, "")]
        return results.MountTable(
            [
                results.MountRow(id, f"/mnt/{id}", "fake", n, True, False, "", 1.5, held)
                for id, n in self.counts.items()
            ]
        )

    async def create(
        self,
        id: LayerId,
        *,
        parent: LayerId | None,
        mount_label: str,
        storage_opt: Mapping[str, str],
    ) -> results.Created:
        for key in storage_opt:
            raise InvalidParams(f"no storage option {key}")
        await self._work("create", id)
        if id in self.parents:
            raise LayerExists(f"layer {id} exists", id=id)
        if parent is not None and parent not in self.parents:
            raise ParentNotFound(f"there is no layer {parent}", id=id, parent=parent)
        self.parents[id] = parent
        return results.Created([])

    async def remove(self, id: LayerId, *, force: bool) -> results.Removed:
        await self._work("remove", id)
        if self.counts.get(id) and not force:
            return results.Removed(False, "in-use", self.counts[id])
        if self.parents.pop(id, self) is self:
            return results.Removed(False, "not-found")
        return results.Removed(True)

    def get(
        self,
        id: LayerId,
        *,
        peer: Peer,
        mount_label: str,
        hold: Literal["manual", "process"],
        name: str = "",
        read_only: bool = False,
    ) -> results.Got | Coroutine[Any, Any, results.Got]:
        self.peers.append(peer)
        if id.startswith("slow") or id not in self.parents:
            return self._get(id)
        self.calls += [f"get {id}", f"get {id} done"]
        return self._count(id)

    async def _get(self, id: LayerId) -> results.Got:
        self._require(id)
        await self._work("get", id)
        return self._count(id)

    def _count(self, id: LayerId) -> results.Got:
        self.counts[id] = self.counts.get(id, 0) + 1
        self.tick.change(f"get {id}")
        return results.Got(f"/mnt/{id}", self.counts[id], True, False, True)

    def put(
        self, id: LayerId, *, peer: Peer, name: str = ""
    ) -> results.Put | Coroutine[Any, Any, results.Put]:
        if self.counts.get(id, 0) < 2:
            return self._put(id)
        self.calls += [f"put {id}", f"put {id} done"]
        self.counts[id] -= 1
        return results.Put(self.counts[id], True, True)

    async def _put(self, id: LayerId) -> results.Put:
        await self._work("put", id)
        self.counts[id] = max(0, self.counts.get(id, 0) - 1)
        return results.Put(self.counts[id], self.counts[id] > 0, True)

    async def diff(
        self, id: LayerId, *, parent: LayerId | None, out: int, digest: bool
    ) -> results.Streamed:
        self._require(id)
        await self._work("diff", id)
        os.write(out, TAR)
        if digest:
            return results.Streamed(len(TAR), 1, [], f"sha256:{0:064x}")
        return results.Streamed(len(TAR), 1, [])

    async def apply_diff(
        self, id: LayerId, *, parent: LayerId | None, source: int, digest: bool
    ) -> results.Streamed:
        self._require(id)
        await self._work("apply_diff", id)
        self.applied[id] = os.read(source, 1 << 16)
        return results.Streamed(len(self.applied[id]), 1, [])

    async def diff_size(self, id: LayerId, *, parent: LayerId | None) -> results.Size:
        self._require(id)
        return results.Size(len(TAR))

    async def usage(self, id: LayerId) -> results.Usage:
        self._require(id)
        await self._work("usage", id)
        return results.Usage(4096, 2)

    async def seal(self, id: LayerId) -> results.Usage:
        self._require(id)
        await self._work("seal", id)
        return results.Usage(4096, 2)

    async def changes(
        self, id: LayerId, *, parent: LayerId | None, after: str, limit: int
    ) -> results.Changes:
        self._require(id)
        await self._work("changes", id)
        rows = [results.Change("add", path=f"/{n}") for n in range(5)]
        rows.append(results.Change("delete", path_base64="L/8="))
        start = int(after or 0)
        more = str(start + limit) if start + limit < len(rows) else ""
        return results.Changes(rows[start : start + limit], more)

    async def get_metadata(self, id: LayerId) -> results.Metadata:
        self._require(id)
        return results.Metadata({"id": id, "content": f"/diff/{id}"})

    async def cleanup(self) -> results.Cleanup:
        self.calls.append("cleanup")
        if self.failure:
            raise self.failure
        return results.Cleanup([], [results.FailedUnmount("a", "EBUSY", [])])

    async def holders(self, id: LayerId) -> results.Holders:
        self._require(id)
        return results.Holders([results.Holder(1, "init", ["cwd"])])

    async def check(self, *, id: LayerId | None, deep: bool, repair: bool) -> results.Check:
        self.calls.append(f"check {id} {deep} {repair}")
        return results.Check([results.Problem("a", "stray", "x", repair)])

    async def checkpoint(self, id: LayerId, *, below: LayerId) -> results.Checkpointed:
        self._require(id)
        await self._work("checkpoint", id)
        self.parents[below] = self.parents[id]
        return results.Checkpointed(below, False, self.counts.get(id, 0), [])

    async def rollback(self, id: LayerId, *, to: LayerId | None) -> results.RolledBack:
        self._require(id)
        await self._work("rollback", id)
        return results.RolledBack(to or "", self.counts.get(id, 0), True)

    async def squash(self, id: LayerId, *, onto: LayerId | None) -> results.Squashed:
        self._require(id)
        await self._work("squash", id)
        return results.Squashed(["c"], ["d"])

    async def convert(self, id: LayerId, *, to: Dialect) -> results.Converted:
        self._require(id)
        await self._work("convert", id)
        return results.Converted(to is Dialect.OVERLAY)
