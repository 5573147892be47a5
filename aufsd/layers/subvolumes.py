"""Checkpoint and rollback of layers that are snapshots (btrfs). Nothing is unmounted.

A checkpoint is a snapshot, and may be made while the layer is in use. A rollback puts another
subvolume at the layer's path, so it is refused while a process has the present one open.
"""

import os
from dataclasses import dataclass
from functools import partial

import trio
from msgspec import to_builtins

from aufsd import results
from aufsd.active.mounts import Mounts
from aufsd.active.refs import Entry
from aufsd.archive import twin
from aufsd.archive.jobs import Jobs
from aufsd.archive.relabel import label_of
from aufsd.kernel.beneath import DIRECTORY
from aufsd.kernel.subvolume_users import users_of
from aufsd.layers.checkpoints import refuse_checkpoint, refuse_rollback, refused
from aufsd.store import content as contents
from aufsd.store import removal, replacing, subvolumes
from aufsd.store.ids import LayerId
from aufsd.tasks import AutoResetEvent
from aufsd.threads import Disk
from aufsd_client.errors import UnmountBusy


@dataclass(frozen=True, slots=True)
class SnapshotCheckpoints:
    """See Checkpoints."""

    mounts: Mounts
    jobs: Jobs
    disk: Disk
    deletion_due: AutoResetEvent

    async def checkpoint(self, id: LayerId, below: LayerId) -> results.Checkpointed:
        """As Checkpoints. Cancelled before the snapshot: nothing was done, after it: done."""
        store = self.mounts.store
        refuse = partial(refuse_checkpoint, self.mounts, id, below)
        async with self.mounts.table.replacing((id, below), refuse):
            warnings = []
            content = store.layout.content(id)
            store.register(below, store.parent[id])
            try:
                if await self.disk.run(contents.holds_subvolumes, content):
                    warnings.append(f"subvolumes inside of {id} show as empty in {below}")
                with trio.CancelScope(shield=True):
                    await self.disk.run(subvolumes.checkpoint, store, id, below)
            except BaseException as error:
                store.forget(below)
                self.deletion_due.set()
                if isinstance(error, OSError):
                    raise refused(error, id) from error
                raise
            replacing.checkpoint_in_index(store, id, below)
        entry = self.mounts.table.entries.get(id)
        return results.Checkpointed(below, True, len(entry.references) if entry else 0, warnings)

    async def rollback(self, id: LayerId, to: LayerId | None) -> results.RolledBack:
        """As Checkpoints. Cancelled before the commit: nothing was done, after it: done."""
        store = self.mounts.store
        refuse = partial(refuse_rollback, self.mounts, id, to)
        ids = (id,) if to is None or to == id else (id, to)
        async with self.mounts.table.replacing(ids, refuse):
            parent = store.parent[id] if to is None else to
            entry = self.mounts.table.entries.get(id)
            try:
                held = await self.disk.run(self._has_changed, id, store.parent[id])
                staged = await self.disk.run(subvolumes.stage_rollback, store, id, parent)
                try:
                    await self._label(id, staged, parent)
                    if entry is not None:
                        await self._refuse_open(id)
                except BaseException:
                    with trio.CancelScope(shield=True):
                        await self.disk.run(removal.discard_staged, store, staged)
                    raise
                with trio.CancelScope(shield=True):
                    await self.disk.run(self._exchange, id, parent, staged, entry)
            except OSError as error:
                raise refused(error, id) from error
            finally:
                self.deletion_due.set()
            replacing.restand(store, id, parent)
        return results.RolledBack(parent or "", len(entry.references) if entry else 0, held)

    async def _label(self, id: LayerId, staged: str, parent: LayerId | None) -> None:
        """Label new content as the old one, unless the snapshot has that label already."""
        layout = self.mounts.store.layout
        own = await self.disk.run(label_of, layout.content(id))
        above = await self.disk.run(label_of, layout.content(parent)) if parent else None
        if own is not None and own != above:
            await self.jobs.relabel(id, staged, own.decode())

    async def _refuse_open(self, id: LayerId) -> None:
        """Raise UnmountBusy if a process has a file of the layer open."""
        device = os.lstat(self.mounts.store.layout.content(id)).st_dev
        found = await self.mounts.scans.run(users_of, device)
        if found:
            names = ", ".join(f"{each.comm} ({each.pid})" for each in found[:5])
            raise UnmountBusy(
                f"layer {id} is in use by {names}, who would keep what is thrown away; end that, "
                "then try again",
                id=id,
                errno="EBUSY",
                holders=[to_builtins(each) for each in found],
            )

    # --- in a thread --------------------------------------------------------------------------

    def _exchange(
        self, id: LayerId, parent: LayerId | None, staged: str, entry: Entry | None
    ) -> None:
        store = self.mounts.store
        chain = store.chain(parent) if parent is not None else ()
        ready = subvolumes.prepare_rollback(store, id, chain, staged)
        try:
            replacing.commit(ready)
        finally:
            ready.close()
            if entry is not None and entry.read_only:
                contents.freeze(store.layout.content(id), True)
        replacing.discard_old(store, id)

    def _has_changed(self, id: LayerId, parent: LayerId | None) -> bool:
        """Whether a layer differs from its parent; true if that is not known at once."""
        layout = self.mounts.store.layout
        own = os.open(layout.content(id), DIRECTORY)
        try:
            if parent is None:
                return bool(os.listdir(own))
            above = os.open(layout.content(parent), DIRECTORY)
            try:
                common = twin.find(own, above, self.mounts.store.xattr_namespace)
                if common is None:
                    return True
                now, then = os.fstat(own), os.fstat(above)
                # the top directories differ by aufsd's own xattrs
                return bool(common.touched - {now.st_ino}) or any(
                    getattr(now, name) != getattr(then, name)
                    for name in ("st_mode", "st_uid", "st_gid", "st_mtime_ns")
                )
            finally:
                os.close(above)
        finally:
            os.close(own)
