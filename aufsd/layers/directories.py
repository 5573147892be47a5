"""Layers that are directories: each holds its own changes, and is mounted over its parents.

This is what Docker's aufs driver made, and what every backend but btrfs mounts.
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
from aufsd.store import dialect as dialects
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.tasks import AutoResetEvent
from aufsd.threads import Disk
from aufsd.union.backend import Backend
from aufsd_client.errors import LayerInUse


@dataclass(frozen=True, slots=True)
class Directories:
    """See Content. `deletion_due` is set when there is content to delete in the background."""

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
        """As Content.create. A label is not kept; no backend of this kind has a limit of `size`."""
        xattrs = dialects.xattrs(self.backend.dialect, self.store.xattr_namespace)
        await self.disk.run(self.store.create_on_disk, id, parents, xattrs)
        # moby b937aa8e69: the aufs driver takes a label at Get and not at Create
        return ["mount_label counts at get; create does not keep it"] if label else []

    async def apply(self, id: LayerId, source: int, *, digest: bool) -> results.Streamed:
        """As Content.apply. Raises LayerInUse if a layer on this one depends on its content."""
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
                self.store.swap_in, id, staged, made.fingerprint, settled=made.settled
            )
            staged = ""
        finally:
            if staged:
                with trio.CancelScope(shield=True):
                    await self.disk.run(self.store.discard_staged, staged)
            self.deletion_due.set()
        return made.streamed

    def needs_mount(self, chain: tuple[LayerId, ...], *, read_only: bool) -> bool:
        """As Content.needs_mount: all but a layer without parents that may be written to."""
        return len(chain) > 1 or read_only

    async def prepare_to_give(self, id: LayerId, *, read_only: bool) -> None:
        """As Content.prepare_to_give: what an apply recorded of the content is taken back."""
        # no thread where that is known to be done
        if not read_only and id not in self.store.unrecorded:
            await self.disk.run(self.store.unrecord, id)

    def compared_with(self, chain: tuple[LayerId, ...]) -> tuple[LayerId, ...]:
        """As Content.compared_with: the directory is the change."""
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
        """For an archive into the first of a chain: the branches, whether it is empty, staging."""
        chain = self.chains.branches(ids)
        empty = self._is_empty(ids[0])
        if empty:
            # nothing to keep: written as the backend reads it, so that it never converts
            chain = (Branch(ids[0], self.backend.dialect), *chain[1:])
        xattrs = dialects.xattrs(chain[0].dialect, self.store.xattr_namespace)
        return chain, empty, self.store.stage(ids[0], xattrs)

    def _is_empty(self, id: LayerId) -> bool:
        content = self.store.layout.content(id)
        # overlayfs's mark is an xattr, and hides what lies below all the same
        if dialects.has_opaque_xattr(content, self.store.xattr_namespace):
            return False
        with os.scandir(content) as entries:
            return next(entries, None) is None
