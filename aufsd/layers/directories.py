"""Layers that are directories. Each holds its own changes, and is mounted over its parents.

Docker's aufs driver made such layers. Every backend but btrfs mounts them.
"""

import os
from dataclasses import dataclass

import trio

from aufsd import results
from aufsd.active.table import Table
from aufsd.archive.jobs import Jobs
from aufsd.archive.requests import Branch
from aufsd.layers import check, fingerprints
from aufsd.layers.branches import Chains
from aufsd.results import Problem
from aufsd.store import creation, removal, staging, whiteouts
from aufsd.store import dialect as dialects
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.tasks import AutoResetEvent
from aufsd.threads import Disk
from aufsd.union.backend import Backend
from aufsd_client.errors import LayerInUse


@dataclass(frozen=True, slots=True)
class Directories:
    """See Content. It sets `deletion_due` when there is content to delete in the background."""

    store: Store
    backend: Backend
    table: Table
    jobs: Jobs
    disk: Disk
    chains: Chains
    deletion_due: AutoResetEvent

    async def create(
        self, id: LayerId, parents: tuple[LayerId, ...], *, label: str, size: int
    ) -> list[str]:
        """As Content.create. Neither `label` nor `size` has an effect here."""
        xattrs = dialects.xattrs(self.backend.dialect, self.store.xattr_namespace)
        await self.disk.run(creation.create_on_disk, self.store, id, parents, xattrs)
        # moby b937aa8e69: the aufs driver takes a label at Get and not at Create
        return ["mount_label counts at get; create does not keep it"] if label else []

    async def apply(self, id: LayerId, source: int, *, digest: bool) -> results.Streamed:
        """As Content.apply. Raises LayerInUse if a layer above depends on this one's content."""
        if settled := await self.disk.run(self.store.settled_on, id):
            raise LayerInUse(
                f"layer {id} has to stay as it is: whiteouts of {settled[0]}, which stands on "
                "it, were judged by what it holds; apply a layer before those that stand on it",
                id=id,
                layers=settled[:20],
            )
        staged = ""
        try:
            chain, empty, staged = await self.disk.run(self._stage, self.store.chain(id))
            if not empty:
                await self.jobs.clone(id, staged)
            made = await self.jobs.apply_recorded(chain, staged, source, digest=digest)
            await self.disk.run(
                staging.swap_in, self.store, id, staged, made.fingerprint, settled=made.settled
            )
            staged = ""
        finally:
            if staged:
                with trio.CancelScope(shield=True):
                    await self.disk.run(removal.discard_staged, self.store, staged)
            self.deletion_due.set()
        return made.streamed

    def needs_mount(self, chain: tuple[LayerId, ...], *, read_only: bool) -> bool:
        """As Content.needs_mount: false only for a writable layer without parents."""
        return len(chain) > 1 or read_only

    async def before_giving_out(self, id: LayerId, *, read_only: bool) -> None:
        """As Content.before_giving_out: the record of the last apply is deleted."""
        # no thread if it is known to be deleted
        if not read_only and id not in self.store.unrecorded:
            await self.disk.run(self.store.unrecord, id)

    def compared_with(self, chain: tuple[LayerId, ...]) -> tuple[LayerId, ...]:
        """As Content.compared_with: nothing, because the directory is the change."""
        return ()

    async def check_content(self, ids: list[LayerId]) -> list[Problem]:
        """As Content.check_content."""
        store, table, disk, jobs = self.store, self.table, self.disk, self.jobs
        return [
            *await fingerprints.compare(store, table, disk, jobs, ids),
            *await check.content(store, table, disk, jobs, ids),
        ]

    # --- in a thread --------------------------------------------------------------------------

    def _stage(self, ids: tuple[LayerId, ...]) -> tuple[tuple[Branch, ...], bool, str]:
        """Stage an archive into a layer: the branches, whether it is empty, the staging."""
        chain = self.chains.branches(ids)
        empty = self._is_empty(ids[0])
        if empty:
            # nothing to keep: written in the backend's dialect, so it is never converted
            chain = (Branch(ids[0], self.backend.dialect), *chain[1:])
        xattrs = dialects.xattrs(chain[0].dialect, self.store.xattr_namespace)
        return chain, empty, staging.stage(self.store, ids[0], xattrs)

    def _is_empty(self, id: LayerId) -> bool:
        content = self.store.layout.content(id)
        # an opaque root hides what is below, though the directory is empty
        if whiteouts.has_opaque_xattr(content, self.store.xattr_namespace):
            return False
        with os.scandir(content) as entries:
            return next(entries, None) is None
