"""Squash: merges several layers of a chain into the uppermost, which then shows the same."""

from dataclasses import dataclass
from functools import partial

import structlog
import trio

from aufsd import results
from aufsd.active.mounts import Mounts
from aufsd.archive import requests
from aufsd.archive.jobs import Jobs
from aufsd.archive.requests import Branch
from aufsd.layers.branches import Chains
from aufsd.layers.checkpoints import refused
from aufsd.store import dialect as dialects
from aufsd.store import removal, replacing, seals, squashing, staging
from aufsd.store.ids import LayerId
from aufsd.tasks import AutoResetEvent
from aufsd.threads import Disk
from aufsd_client.errors import LayerHasChildren, ParentNotFound

log = structlog.get_logger(__name__)

# the backend for which an opaque `/` hides nothing
_AUFS = "aufs"


@dataclass(frozen=True, slots=True)
class Squashes:
    """Squash. It sets `deletion_due` when there is content to delete."""

    mounts: Mounts
    chains: Chains
    jobs: Jobs
    disk: Disk
    deletion_due: AutoResetEvent

    async def squash(self, id: LayerId, onto: LayerId | None) -> results.Squashed:
        """Merge the layers from `id` down to `onto`, which stays, into `id`. None: all of them.

        The layers in between are removed, unless they have other children or are in use. All or
        nothing. Cancelled before the commit: nothing was done; after it: done. Raises
        ParentNotFound (`onto` is not below `id`), LayerHasChildren, LayerInUse, LayerSealed,
        NoSpace.
        """
        store, table = self.mounts.store, self.mounts.table
        async with table.replacing((id,), partial(self._refuse, id, onto)):
            chain = store.chain(id)
            between = chain[1 : len(chain) if onto is None else chain.index(onto)]
            if not between:
                return results.Squashed([], [])
            gone = self._removable(id, between)
            # there is no await between here and the claim of the layer itself
            for each in gone:
                table.begin(each)
            try:
                for each in gone:
                    await table.wait_unread(each)
                async with table.reading(lambda: (chain[1 + len(gone) :],)):
                    parents = chain[1 + len(between) :]
                    try:
                        removed = await self._squash(id, between, parents, gone)
                    except OSError as error:
                        raise refused(error, id) from error
                    finally:
                        self.deletion_due.set()
            finally:
                for each in gone:
                    table.end(each)
        kept = [each for each in between if each not in removed]
        return results.Squashed([*removed], [*kept])

    def _refuse(self, id: LayerId, onto: LayerId | None) -> None:
        store, table = self.mounts.store, self.mounts.table
        if onto is not None and onto not in store.chain(id)[1:]:
            raise ParentNotFound(f"layer {id} does not stand on {onto}", id=id, parent=onto)
        seals.require_unsealed(store, id)
        children = sorted(store.children_of(id))
        if children:
            raise LayerHasChildren(
                f"other layers stand on {id}, and name what it stands on; squash one of those",
                id=id,
                children=children[:20],
            )
        if id in table.entries:
            raise table.in_use(id)

    def _removable(self, id: LayerId, between: tuple[LayerId, ...]) -> list[LayerId]:
        """The layers that only `id` needs, nearest first. One that stays keeps all below it."""
        store, table = self.mounts.store, self.mounts.table
        found, above = list[LayerId](), id
        for each in between:
            if store.children_of(each) != {above} or each in table.entries:
                break
            if self.mounts.is_mount_point(each):
                break
            found.append(each)
            above = each
        return found

    async def _squash(
        self,
        id: LayerId,
        between: tuple[LayerId, ...],
        parents: tuple[LayerId, ...],
        gone: list[LayerId],
    ) -> list[LayerId]:
        """Squash. The layers that were removed."""
        store, backend = self.mounts.store, self.mounts.backend
        if backend.snapshots:
            commit = partial(
                squashing.squash_subvolume, store, id, parents, between[-1], tuple(gone)
            )
        else:
            staged = await self._merge(id, between, parents, kept=between[len(gone) :])
            commit = partial(squashing.squash_directory, store, id, parents, staged, gone)
        removed: list[LayerId] = []
        with trio.CancelScope(shield=True):
            await self.disk.run(commit)
            self.chains.forget(id)
            replacing.restand(store, id, parents[0] if parents else None)
            removed = await self._remove(id, gone)
        return removed

    async def _merge(
        self,
        id: LayerId,
        between: tuple[LayerId, ...],
        parents: tuple[LayerId, ...],
        *,
        kept: tuple[LayerId, ...],
    ) -> str:
        """Merge the layers in staging. The path."""
        store, backend = self.mounts.store, self.mounts.backend
        branches = await self.disk.run(self._branches, (id, *between, *parents))
        merged = 1 + len(between)
        xattrs = dialects.xattrs(backend.dialect, store.xattr_namespace)
        staged = await self.disk.run(staging.stage, store, id, xattrs)
        try:
            work = requests.Squash(
                branches[:merged],
                branches[merged:],
                kept,
                staged.removeprefix(store.layout.root),
                backend.dialect,
                backend.name != _AUFS,
            )
            await self.jobs.squash(work)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.disk.run(removal.discard_staged, store, staged)
            raise
        return staged

    def _branches(self, ids: tuple[LayerId, ...]) -> tuple[Branch, ...]:
        store = self.mounts.store
        store.identity.verify()
        return tuple(Branch(each, store.dialect(each)) for each in ids)

    async def _remove(self, id: LayerId, gone: list[LayerId]) -> list[LayerId]:
        """Remove the layers in between, until one cannot be removed. Those that were."""
        store, removed = self.mounts.store, list[LayerId]()
        for each in gone:
            self.chains.forget(each)
            # try twice; a layer that stays does no harm
            if not (await self._removed(each) or await self._removed(each)):
                break
            store.forget(each)
            removed.append(each)
        await self.disk.run(squashing.forget_gone, store, id)
        return removed

    async def _removed(self, id: LayerId) -> bool:
        try:
            left = await self.disk.run(removal.remove_on_disk, self.mounts.store, id)
        except OSError as error:
            log.warning("a squashed layer stays", id=id, error=str(error))
            return False
        for failure in left:
            log.warning("content of a squashed layer is still there", error=str(failure))
        return True
