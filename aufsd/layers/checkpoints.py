"""Checkpoint and rollback of layers that are directories.

The layer is unmounted, its content is renamed away (store/replacing.py), and if it has references
it is mounted again, all within the call. After the unmount the call cannot be cancelled: it is done
or undone, and the references stay in both cases. Everything that needs a descriptor or disk space
is made, or reserved, before the unmount.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog
import trio

from aufsd import results
from aufsd.active import remount
from aufsd.active.mounts import Mounts
from aufsd.active.refs import BIND
from aufsd.archive import errnos
from aufsd.kernel.spare import Spare
from aufsd.layers.branches import Chains
from aufsd.store import replacing, seals, whiteouts
from aufsd.store.ids import LayerId
from aufsd.store.replacing import Prepared
from aufsd.store.space import no_space
from aufsd.store.whiteouts import HOUSEKEEPING
from aufsd.tasks import AutoResetEvent
from aufsd.threads import Disk
from aufsd_client.errors import (
    InvalidParams,
    LayerExists,
    LayerHasChildren,
    LayerInUse,
    ParentNotFound,
    TooManyLayers,
)

log = structlog.get_logger(__name__)

# descriptors that a mount opens besides those of its branches, with those of a helper process
_MORE_DESCRIPTORS = 16


def refuse_checkpoint(mounts: Mounts, id: LayerId, below: LayerId) -> None:
    """Raise if `id` may not be checkpointed as `below`. Reads memory only."""
    store, backend = mounts.store, mounts.backend
    if store.exists(below):
        raise LayerExists(f"layer {below} exists already", id=below)
    _refuse(mounts, id, "checkpoint")
    most, length = backend.max_branches, len(store.chain(id)) + 1
    if length > most:
        raise TooManyLayers(
            f"layer {id} would be the {length}th of its chain; {backend.name} takes {most} here; "
            f"put it and make the chain shorter, `aufsctl squash {id} ONTO`",
            id=id,
            limit=most,
        )


def refuse_rollback(mounts: Mounts, id: LayerId, to: LayerId | None) -> None:
    """Raise if `id` may not be rolled back to `to`. Reads memory only."""
    store = mounts.store
    if to is not None:
        if not store.exists(to):
            raise ParentNotFound(f"there is no layer {to}", id=id, parent=to)
        store.require(to)
        if id in store.chain(to):
            raise InvalidParams(f"layer {to} stands on {id}, which cannot stand on it too", id=id)
    _refuse(mounts, id, "rollback")


def _refuse(mounts: Mounts, id: LayerId, verb: str) -> None:
    """Raise if the layer's content may not be replaced. Reads memory only."""
    store, backend, entry = mounts.store, mounts.backend, mounts.table.entries.get(id)
    seals.require_unsealed(store, id)
    children = sorted(store.children_of(id))
    if children:
        raise LayerHasChildren(
            f"other layers stand on {id}, so it changes no more: it is frozen already; "
            f"make a layer on it, and {verb} that",
            id=id,
            children=children[:20],
        )
    # a checkpoint of a snapshot does not move the layer
    if entry is None or backend.snapshots:
        return
    if not entry.mounted or entry.backend == BIND:
        raise LayerInUse(
            f"layer {id} has no parents and is in use: those who use it have the path of its "
            f"content, which would change; make a layer on it, and {verb} that",
            id=id,
            references=len(entry.references),
            layers=[id],
            holders=[],
        )
    if entry.backend != backend.name:
        raise LayerInUse(
            f"layer {id} is still mounted by {entry.backend}, which served this store before; "
            "put it first",
            id=id,
            references=len(entry.references),
            layers=[id],
            holders=[],
        )


def refused(error: OSError, id: LayerId) -> Exception:
    """The API's error for an error of the store's file system; the same error if it is a fault."""
    return no_space(error, id) or errnos.answer(error, id=id) or error


class Checkpoints(Protocol):
    """Checkpoint and rollback, for each of the two kinds of layer content."""

    async def checkpoint(self, id: LayerId, below: LayerId) -> results.Checkpointed:
        """Move what `id` holds into a new, sealed layer `below`, and put `id`, now empty, on it.

        All or nothing. Raises LayerExists, LayerHasChildren, LayerInUse, LayerSealed, UnmountBusy,
        TooManyLayers, NoSpace.
        """

    async def rollback(self, id: LayerId, to: LayerId | None) -> results.RolledBack:
        """Throw away what `id` holds. With `to`, that layer becomes its parent.

        All or nothing. Raises ParentNotFound, LayerHasChildren, LayerInUse, LayerSealed,
        UnmountBusy, NoSpace, and InvalidParams if `to` stands on `id`.
        """


@dataclass(frozen=True, slots=True)
class DirectoryCheckpoints:
    """For layers that are directories. It sets `deletion_due` when there is content to delete."""

    mounts: Mounts
    chains: Chains
    disk: Disk
    deletion_due: AutoResetEvent

    async def checkpoint(self, id: LayerId, below: LayerId) -> results.Checkpointed:
        """As Checkpoints. Cancelled before the unmount: nothing was done, after it: done."""
        store = self.mounts.store
        refuse = partial(refuse_checkpoint, self.mounts, id, below)
        async with self.mounts.table.replacing((id, below), refuse):
            store.register(below, store.parent[id])
            try:
                await self.chains.prepare(store.chain(id))
                with trio.CancelScope(shield=True):
                    await self._checkpoint(id, below)
            except BaseException:
                if store.parent[id] != below:
                    self.chains.forget(below)
                    store.forget(below)
                raise
        entry = self.mounts.table.entries.get(id)
        return results.Checkpointed(below, False, len(entry.references) if entry else 0, [])

    async def _checkpoint(self, id: LayerId, below: LayerId) -> None:
        store, dialect = self.mounts.store, self.mounts.backend.dialect

        def enter() -> None:
            replacing.checkpoint_in_index(store, id, below)
            self.chains.moved(id, below)

        def leave() -> None:
            replacing.checkpoint_out_of_index(store, id, below)
            self.chains.moved_back(id, below)

        prepare = partial(replacing.prepare_checkpoint, store, id, below, dialect)
        await self._replace(id, prepare, enter, leave)

    async def rollback(self, id: LayerId, to: LayerId | None) -> results.RolledBack:
        """As Checkpoints. Cancelled before the unmount: nothing was done, after it: done."""
        store = self.mounts.store
        refuse = partial(refuse_rollback, self.mounts, id, to)
        ids = (id,) if to is None or to == id else (id, to)
        async with self.mounts.table.replacing(ids, refuse):
            before = store.parent[id]
            parent = before if to is None else to
            chain = store.chain(parent) if parent is not None else ()
            await self.chains.prepare((id, *chain))
            with trio.CancelScope(shield=True):
                held = await self._rollback(id, before, chain)
        entry = self.mounts.table.entries.get(id)
        self.deletion_due.set()
        return results.RolledBack(parent or "", len(entry.references) if entry else 0, held)

    async def _rollback(
        self, id: LayerId, before: LayerId | None, parents: tuple[LayerId, ...]
    ) -> bool:
        """Roll back. Whether the layer held anything."""
        store, dialect = self.mounts.store, self.mounts.backend.dialect
        opaque = held = False

        def enter() -> None:
            nonlocal opaque
            replacing.restand(store, id, parents[0] if parents else None)
            opaque = self.chains.emptied(id)

        def leave() -> None:
            replacing.restand(store, id, before)
            store.unrecorded.discard(id)
            self.chains.filled_again(id, opaque=opaque)

        def prepare() -> Prepared:
            nonlocal held
            held = self._holds_something(id)
            return replacing.prepare_rollback(store, id, parents, dialect)

        await self._replace(id, prepare, enter, leave)
        await self.disk.run(replacing.discard_old, store, id)
        return held

    # --- what both share ----------------------------------------------------------------------

    async def _replace(
        self,
        id: LayerId,
        prepare: Callable[[], Prepared],
        enter: Callable[[], None],
        leave: Callable[[], None],
    ) -> None:
        """Prepare, unmount, commit, mount again. If a step fails, those before it are undone.

        `enter` changes the index after the commit, and `leave` undoes that. Raises errors of the
        API, and OSError for a fault of aufsd.
        """
        try:
            ready, spare = await self.disk.run(self._prepare, id, prepare)
            try:
                await self._exchange(id, ready, spare, enter, leave)
            finally:
                spare.release()
                ready.close()
        except OSError as error:
            self.deletion_due.set()
            raise refused(error, id) from error

    def _prepare(self, id: LayerId, prepare: Callable[[], Prepared]) -> tuple[Prepared, Spare]:
        """Do everything that may lack space or descriptors, while the layer is still mounted."""
        # one descriptor for each branch, if the mount is by number
        mounted = id in self.mounts.table.entries
        spare = Spare(len(self.mounts.store.chain(id)) + _MORE_DESCRIPTORS if mounted else 0)
        try:
            return prepare(), spare
        except BaseException:
            spare.release()
            raise

    async def _exchange(
        self,
        id: LayerId,
        ready: Prepared,
        spare: Spare,
        enter: Callable[[], None],
        leave: Callable[[], None],
    ) -> None:
        before = self.mounts.table.entries.get(id)
        try:
            taken, ended = await remount.unmount(self.mounts, id)
        except BaseException:
            await self._take_back(ready)
            self.deletion_due.set()
            raise
        entered = False
        try:
            if before is not None and not ended:
                await remount.refuse_if_alive(self.mounts, id, before)
            await self.disk.run(replacing.commit, ready)
            enter()
            entered = True
            if taken is not None:
                spare.release()
                opaque = await self.chains.prepare(self.mounts.store.chain(id))
                await remount.mount(self.mounts, id, opaque)
        except BaseException as error:
            spare.release()
            self.deletion_due.set()
            first = None
            if await self._take_back(ready):
                if entered:
                    leave()
            else:
                # a restart would find the operation done, so it is
                first = partial(self.disk.run, replacing.finish, self.mounts.store, ready.move)
                if not entered:
                    enter()
            if await remount.restore(self.mounts, id, error, first=first) and first is not None:
                return
            raise

    async def _take_back(self, ready: Prepared) -> bool:
        try:
            await self.disk.run(replacing.take_back, ready)
        except (OSError, RuntimeError) as error:
            log.warning("a layer is between two states", id=ready.move.id, error=str(error))
            return False
        return True

    def _holds_something(self, id: LayerId) -> bool:
        store = self.mounts.store
        content = store.layout.content(id)
        if whiteouts.has_opaque_xattr(content, store.xattr_namespace):
            return True
        with os.scandir(content) as entries:
            return any(os.fsencode(entry.name) not in HOUSEKEEPING for entry in entries)
