"""The operations of the graph driver, one method for each row of the table in api.md.

Ids and labels are parsed already. A method either does all of what it says, or raises one of
aufsd_client.errors and has done nothing. A cancelled one has done nothing too, unless it says so.
"""

import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import structlog
import trio

from aufsd import __version__, listing, results
from aufsd.active import clearing
from aufsd.active.in_use import HolderLookup
from aufsd.active.mounts import Mounts
from aufsd.active.refs import Entry, Reference
from aufsd.active.tick import Tick
from aufsd.archive.jobs import Jobs
from aufsd.archive.requests import Branch
from aufsd.kernel import holders as kernel_holders
from aufsd.kernel.peer import Peer, View
from aufsd.layers import check as checks
from aufsd.layers.access import Access
from aufsd.layers.background import Upkeep
from aufsd.layers.branches import Chains
from aufsd.layers.checkpoints import Checkpoints
from aufsd.layers.content import Content
from aufsd.layers.squash import Squashes
from aufsd.status import Overview
from aufsd.store import removal, seals
from aufsd.store.check import readable
from aufsd.store.dialect import Dialect
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.store.space import no_space
from aufsd.tasks import AutoResetEvent
from aufsd.threads import Disk
from aufsd.union.backend import Backend
from aufsd.union.btrfs import parse_size
from aufsd_client.errors import (
    InvalidParams,
    LayerDamaged,
    LayerInUse,
    LayerNotFound,
    ParentNotFound,
    TooManyLayers,
)

log = structlog.get_logger(__name__)

API = 1
# rows of a `list` between two checkpoints
_PIECE = 250
FEATURES = (
    "batches",
    "checkpoint",
    "created",
    "descriptors",
    "diff-id",
    "digests",
    "hold-process",
    "naive-diff",
    "named-holds",
    "seal",
    "usage",
)


@dataclass(slots=True)
class Driver:
    """The operations over one store. It owns nothing; `open_driver` makes what it uses."""

    store: Store
    backend: Backend
    active: Mounts
    jobs: Jobs
    disk: Disk
    overview: Overview
    render_metrics: Callable[[], results.Metrics]
    access: Access
    chains: Chains
    content: Content
    checkpoints: Checkpoints
    squashes: Squashes
    # set when there is content to delete in the background
    deletion_due: AutoResetEvent
    upkeep: Upkeep
    holder_lookup: HolderLookup

    @property
    def tick(self) -> Tick:
        """See aufsd/active/tick.py."""
        return self.active.table.tick

    # --- questions that touch memory only -----------------------------------------------------

    def version(self) -> results.Version:
        """The version of the daemon and of the API."""
        return results.Version(__version__, API, self.backend.name, list(FEATURES))

    def status(self) -> results.Status:
        """Docker's four rows, and more for an operator."""
        return self.overview.status()

    def health(self) -> results.Health:
        """The health checks, for a monitoring script."""
        return self.overview.health()

    def metrics(self) -> results.Metrics:
        """Prometheus text exposition."""
        return self.render_metrics()

    def exists(self, id: LayerId) -> results.Exists:
        """Whether there is such a layer."""
        return results.Exists(self.store.exists(id))

    async def layers(self, *, after: str, limit: int, prefix: str = "") -> results.Layers:
        """One page of the layers, by id. Other calls run between pieces of it."""
        ids, more = listing.page(self.store, after=after, limit=limit, prefix=prefix)
        rows: list[results.LayerRow] = []
        depths: dict[LayerId, int] = {}
        for at in range(0, len(ids), _PIECE):
            piece = ids[at : at + _PIECE]
            rows += listing.layers(self.store, self.active.table.entries, piece, depths)
            await trio.lowlevel.checkpoint()
        return results.Layers(rows, more)

    def mounts(self) -> results.MountTable:
        """The active-mount table."""
        return listing.mounts(self.store.layout, self.active.table.entries)

    # --- layers -------------------------------------------------------------------------------

    async def create(
        self,
        id: LayerId,
        *,
        parent: LayerId | None,
        mount_label: str,
        storage_opt: Mapping[str, str],
    ) -> results.Created:
        """Make an empty layer on top of `parent`. It is durable when this returns."""
        for key in storage_opt:
            if key not in self.backend.storage_options:
                raise InvalidParams(f"{self.backend.name} has no storage option {key!r}")
        size = parse_size(storage_opt["size"]) if "size" in storage_opt else 0
        warnings = []
        async with self.active.table.creating(id, parent):
            chain = self.store.chain(id)
            if len(chain) > self.backend.max_branches:
                raise TooManyLayers(
                    f"layer {id} would be the {len(chain)}th of its chain; "
                    f"{self.backend.name} takes {self.backend.max_branches} here",
                    id=id,
                    limit=self.backend.max_branches,
                )
            entry = self.active.table.entries.get(parent) if parent else None
            written = entry and not entry.read_only
            if written and self.backend.live_lower_warning:
                warnings.append(f"parent {parent}: {self.backend.live_lower_warning}")
            warnings += await self.content.create(id, chain[1:], label=mount_label, size=size)
        return results.Created(warnings)

    async def remove(self, id: LayerId, *, force: bool) -> results.Removed:
        """Remove a layer without children; with `force`, even if it has references."""
        try:
            async with clearing.removing(self.active, id, force=force):
                self.chains.forget(id)
                left = await self.disk.run(removal.remove_on_disk, self.store, id)
                self.store.forget(id)
        except LayerInUse as error:
            references = error.data["references"]
            assert isinstance(references, int)
            return results.Removed(False, "in-use", references)
        except LayerNotFound:
            # another call has removed it while this one waited
            return results.Removed(False, "not-found")
        except OSError as error:
            # a layer whose parents file is gone needs a name to be marked by
            raise no_space(error, id) or error from error
        for failure in left:
            log.warning("content of a removed layer is still in its place", error=str(failure))
        self.deletion_due.set()
        return results.Removed(True)

    async def get_metadata(self, id: LayerId) -> results.Metadata:
        """Where everything of a layer is, as strings."""
        self.store.require(id)
        try:
            dialect = await self.disk.run(self.chains.dialect, id)
        except LayerDamaged:
            # It may be damaged, or be removed or replaced at this moment. Ask again within a
            # transition, which other calls wait for. A claim for reading would make an apply fail
            # with LayerInUse, only because of this question.
            table = self.active.table
            await table.claim(id, self.store.require)
            try:
                dialect = await self.disk.run(self.chains.dialect, id)
            finally:
                table.end(id)
        chain = self.store.chain(id)
        read_only = seals.is_frozen(self.store, id)
        return listing.metadata(
            self.store,
            self.active.table.entries.get(id),
            chain,
            needs_mount=self.content.needs_mount(chain, read_only=read_only),
            backend=self.backend.name,
            dialect=str(dialect),
        )

    # --- mounts -------------------------------------------------------------------------------

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
        """Count one reference, and mount on the first. A name counts once at most.

        Returns the answer if it only counts, else a coroutine for it.
        """
        reference = _reference(peer, hold, name)
        before, view = self.active.table.entries.get(id), peer.view
        if before is not None and view.has_seen((id, before.mount)):
            entry = self.active.get_now(id, reference, label=mount_label, read_only=read_only)
            if entry is not None:
                return self._got(id, entry, reference)
        return self._get(id, reference, mount_label, view, read_only)

    async def _get(
        self, id: LayerId, reference: Reference, label: str, view: View, read_only: bool
    ) -> results.Got:
        try:
            entry = await self.access.get(
                id, reference, label=label, view=view, read_only=read_only
            )
        except LayerInUse as error:
            await self.holder_lookup.add_to(error)
            raise
        return self._got(id, entry, reference)

    def _got(self, id: LayerId, entry: Entry, reference: Reference) -> results.Got:
        return results.Got(
            path=listing.path(self.store.layout, id, mounted=entry.mounted),
            references=len(entry.references),
            mounted=entry.mounted,
            read_only=entry.read_only,
            # a counted reference is the last one
            new=entry.references[-1] is reference,
        )

    def put(
        self, id: LayerId, *, peer: Peer, name: str = ""
    ) -> results.Put | Coroutine[Any, Any, results.Put]:
        """Drop one reference, that of `name` if given, and unmount after the last.

        Returns the answer if other references are left, else a coroutine for it.
        """
        entry = self.active.put_now(id, pid=peer.pid, name=name)
        if entry is not None:
            return results.Put(len(entry.references), entry.mounted, True)
        return self._put(id, peer.pid, name)

    async def _put(self, id: LayerId, pid: int, name: str) -> results.Put:
        try:
            entry, dropped = await self.active.put(id, pid=pid, name=name)
        except LayerInUse as error:
            await self.holder_lookup.add_to(error)
            raise
        if entry is None:
            # a mount that aufsd did not make stays
            mounted = self.store.exists(id) and self.active.is_mount_point(id)
            return results.Put(0, mounted, dropped)
        return results.Put(len(entry.references), entry.mounted, dropped)

    async def cleanup(self) -> results.Cleanup:
        """Unmount every mount of the store, even with references."""
        done, failed = await clearing.cleanup(self.active)
        rows = []
        for id, failure in failed.items():
            name = str(failure.data["errno"])
            busy = name == "EBUSY"
            found = await self.active.scans.run(
                kernel_holders.look, self.store.layout.mount_point(id), busy=busy
            )
            holders, kernel = (found.holders, found.kernel) if busy else ([], [])
            log.warning("cleanup left a mount", id=id, reason=failure.message)
            rows.append(results.FailedUnmount(id, name, holders, kernel))
        return results.Cleanup(list(done), rows)

    async def holders(self, id: LayerId) -> results.Holders:
        """The processes that keep the layer's mount busy."""
        self.store.require(id)
        target = self.store.layout.mount_point(id)
        busy = id in self.active.table.busy()
        return await self.active.scans.run(kernel_holders.look, target, busy=busy)

    # --- content ------------------------------------------------------------------------------

    async def diff(
        self, id: LayerId, *, parent: LayerId | None, out: int, digest: bool
    ) -> results.Streamed:
        """Write what the layer changed, as a tar, to `out`, which the caller owns.

        Cancelled: the tar is cut short.
        """
        async with self._compared(id, parent) as (chain, against):
            return await self.jobs.diff(chain, out, against=against, digest=digest)

    async def diff_size(self, id: LayerId, *, parent: LayerId | None) -> results.Size:
        """Bytes of the layer's own regular files."""
        async with self._compared(id, parent) as (chain, against):
            return results.Size(await self.jobs.diff_size(chain, against=against))

    async def usage(self, id: LayerId) -> results.Usage:
        """Bytes and inodes of the layer's own content."""
        async with self._compared(id, None) as (chain, against):
            counted = await self.disk.run(seals.read_usage, self.store, id)
            if counted is None:
                used = await self.jobs.usage(chain, against=against)
                return results.Usage(used.size, used.inodes)
        return results.Usage(counted.size, counted.inodes)

    async def seal(self, id: LayerId) -> results.Usage:
        """Sync the layer's content to disk, and refuse every later change of it."""
        async with self.holder_lookup, self.active.table.unused(id):
            counted = await self.disk.run(seals.read_usage, self.store, id)
            if counted is None:
                ids = self.store.chain(id)
                chain = await self.disk.run(self.chains.branches, ids)
                below = self.content.compared_with(ids)
                against = await self.disk.run(self.chains.branches, below) if below else None
                used = await self.jobs.usage(chain, against=against, sync=True)
                counted = seals.Usage(used.size, used.inodes)
                await self.disk.run(seals.seal, self.store, id, counted)
        return results.Usage(counted.size, counted.inodes)

    async def changes(
        self, id: LayerId, *, parent: LayerId | None, after: str, limit: int
    ) -> results.Changes:
        """One page of the paths that the layer changed."""
        async with self._compared(id, parent) as (chain, against):
            below = chain[1:] if against is None else against
            return await self.jobs.changes(chain, against=below, after=after, limit=limit)

    async def apply_diff(
        self, id: LayerId, *, parent: LayerId | None, source: int, digest: bool
    ) -> results.Streamed:
        """Unpack a tar into the layer."""
        self._require_parent(id, parent)
        async with self.holder_lookup, self.active.table.changing(id):
            seals.require_unsealed(self.store, id)
            self.chains.forget(id)
            return await self.content.apply(id, source, digest=digest)

    async def checkpoint(self, id: LayerId, *, below: LayerId) -> results.Checkpointed:
        """Move what `id` holds into a new layer `below`, and put `id`, now empty, on top of it."""
        async with self.holder_lookup:
            return await self.checkpoints.checkpoint(id, below)

    async def rollback(self, id: LayerId, *, to: LayerId | None) -> results.RolledBack:
        """Throw away what `id` holds. With `to`, that layer becomes its parent."""
        async with self.holder_lookup:
            return await self.checkpoints.rollback(id, to)

    async def squash(self, id: LayerId, *, onto: LayerId | None) -> results.Squashed:
        """Merge the layers from `id` down to `onto`, which stays, into `id`. None: all of them."""
        async with self.holder_lookup:
            return await self.squashes.squash(id, onto)

    async def convert(self, id: LayerId, *, to: Dialect) -> results.Converted:
        """Rewrite the layer's whiteouts for another union file system."""
        async with self.holder_lookup, self.active.table.changing(id):
            self.chains.forget(id)
            return results.Converted(await self.upkeep.convert(id, to))

    async def check(self, *, id: LayerId | None, deep: bool, repair: bool) -> results.Check:
        """Compare layers/, diff/, mnt/ and the kernel's mounts; `deep`: the content too."""
        store, table = self.store, self.active.table
        found = await checks.consistency(store, table, self.disk, id=id, repair=repair)
        if deep:
            found += await self.content.check_content(sorted(store.parent) if id is None else [id])
        return results.Check(list(map(readable, found)))

    # --- what these share ---------------------------------------------------------------------

    @asynccontextmanager
    async def _compared(
        self, id: LayerId, parent: LayerId | None
    ) -> AsyncIterator[tuple[tuple[Branch, ...], tuple[Branch, ...] | None]]:
        """Claim the chain of `id` and the chain to compare it with, for reading.

        The second is None if the layer is compared with its own parent, and its directory already
        is the change.
        """

        def which() -> tuple[tuple[LayerId, ...], ...]:
            chain = self.store.chain(id)
            self._require_parent(id, parent)
            own = chain[1] if len(chain) > 1 else None
            if parent is not None and parent != own:
                return chain, self.store.chain(parent)
            below = self.content.compared_with(chain)
            return (chain, below) if below else (chain,)

        async with self.active.table.reading(which) as chains:
            # aufs keeps pseudo-links of a mounted union outside of the branch
            for one in {id: None for chain in chains for id in chain}:
                await self.active.flush(one)
            own, *against = [await self.disk.run(self.chains.branches, each) for each in chains]
            yield own, against[0] if against else None

    def _require_parent(self, id: LayerId, parent: LayerId | None) -> None:
        if parent is not None and not self.store.exists(parent):
            raise ParentNotFound(f"there is no layer {parent}", id=id, parent=parent)


def _reference(peer: Peer, hold: Literal["manual", "process"], name: str) -> Reference:
    if name and hold == "process":
        raise InvalidParams(
            'a reference with a name outlives its process, so hold="process" does not go with it'
        )
    if hold == "process" and not peer.start:
        raise InvalidParams(
            'hold="process" needs a process that the daemon can see, and this one has ended, is in '
            "a pid namespace above the daemon's, or connected when the daemon had no file "
            'descriptor left; connect anew, or use hold="manual"'
        )
    return Reference(peer.pid, peer.uid, peer.comm, hold, time.time(), peer.start, name)
