"""Layers that are snapshots of their parents. Each holds all that it shows; nothing is mounted.

Docker's btrfs driver made such layers.
"""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import msgspec
import structlog
import trio

from aufsd import results
from aufsd.active.table import Table
from aufsd.archive.jobs import Jobs
from aufsd.archive.requests import Branch
from aufsd.layers import check
from aufsd.results import Problem
from aufsd.store import content as contents
from aufsd.store import creation, labelled, removal, staging
from aufsd.store import dialect as dialects
from aufsd.store.dialect import Dialect
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.tasks import AutoResetEvent
from aufsd.threads import Disk
from aufsd_client.errors import LayerHasChildren, LayerInUse, LimitExceeded

log = structlog.get_logger(__name__)

# mount labels that mean "no label"; the second is Docker's --security-opt
NO_LABEL: Final = ("", "label:disable")
# labels counted for one parent
_REMEMBERED: Final = 1000


@dataclass(slots=True)
class Snapshots:
    """See Content. It sets `deletion_due` when there is content to delete in the background.

    `selinux`: whether a new layer's content is labelled with its mount label.
    """

    store: Store
    jobs: Jobs
    disk: Disk
    table: Table
    deletion_due: AutoResetEvent
    selinux: bool
    # parent -> label -> how many children were labelled inode by inode
    _asked: dict[LayerId, Counter[str]] = field(default_factory=dict)

    async def create(
        self, id: LayerId, parents: tuple[LayerId, ...], *, label: str, size: int
    ) -> list[str]:
        """As Content.create. The parent becomes read-only, unless it is in use."""
        parent = parents[0] if parents else None
        warnings = []
        if label not in NO_LABEL and not self.selinux:
            warnings.append("labels are off for this daemon (selinux = false)")
            label = ""
        staged = ""
        try:
            # a layer on its own -init layer has the label already, with that snapshot
            if label in NO_LABEL or parent == f"{id}-init":
                staged = await self.disk.run(staging.stage_child, self.store, parent, size)
            else:
                staged = await self._stage_labelled(id, parent, label, size)
            if parent is not None:
                if await self.disk.run(contents.holds_subvolumes, self._content(parent)):
                    warnings.append(f"subvolumes inside of parent {parent} show as empty here")
                if parent not in self.table.entries:
                    await self.disk.run(contents.freeze, self._content(parent), True)
            await self.disk.run(
                creation.create_on_disk, self.store, id, parents, self._xattrs(), staged
            )
        finally:
            await self._discard(staged)
        return warnings

    async def _stage_labelled(
        self, id: LayerId, parent: LayerId | None, label: str, size: int
    ) -> str:
        """As staging.stage_child, with the label on every inode.

        To label each inode is slow. So for each read-only parent one labelled snapshot is kept, and
        further children with this label are cloned from it. It is kept when a label comes again
        that has come most often: most labels belong to a single container and never come again.
        """
        store, staged, place = self.store, "", ""
        if parent is not None and parent not in self.table.entries:
            staged, place = await self.disk.run(labelled.stage, store, parent, label, size)
        if staged:
            return staged
        staged = await self.disk.run(staging.stage_child, store, parent, size)
        try:
            await self.jobs.relabel(id, staged, label)
            # the kept snapshot would have the limit too
            if parent is not None and place and not size and self._comes_most(parent, label):
                # the layer is complete without it
                with suppress(OSError):
                    await self.disk.run(labelled.keep, store, parent, staged, place)
        except BaseException:
            await self._discard(staged)
            raise
        return staged

    def _comes_most(self, parent: LayerId, label: str) -> bool:
        """Whether the label has come before, and more often than every other."""
        asked = self._asked.setdefault(parent, Counter())
        if len(asked) >= _REMEMBERED:
            asked.clear()
        asked[label] += 1
        count = asked[label]
        return count > 1 and all(n < count for other, n in asked.items() if other != label)

    def needs_mount(self, chain: tuple[LayerId, ...], *, read_only: bool) -> bool:
        """As Content.needs_mount: never."""
        return False

    async def before_giving_out(self, id: LayerId, *, read_only: bool) -> None:
        """As Content.before_giving_out: the subvolume is made read-only, or writable.

        A layer with children is read-only: the changes of a child are found by comparing it with
        its parent.
        """
        await self.disk.run(contents.freeze, self._content(id), read_only)
        if not read_only:
            await self.disk.run(labelled.discard, self.store, id)

    async def apply(self, id: LayerId, source: int, *, digest: bool) -> results.Streamed:
        """As Content.apply. A whiteout deletes the name.

        Raises LayerHasChildren too, and LayerInUse if the layer contains subvolumes.
        """
        children = sorted(self.store.children_of(id))
        if children:
            raise LayerHasChildren(
                f"layers that were made as snapshots of {id} would not show the change",
                id=id,
                children=children[:20],
            )
        if await self.disk.run(contents.holds_subvolumes, self._content(id)):
            raise LayerInUse(f"layer {id} holds subvolumes, which an apply would lose", id=id)
        await self.disk.run(labelled.discard, self.store, id)
        staged = ""
        try:
            staged = await self.disk.run(staging.stage_snapshot, self.store, id, self._xattrs())
            own = (Branch(id, Dialect.NONE),)
            result = await self.jobs.apply(own, staged, source, digest=digest)
            size = await self.jobs.staged_size(id, staged, self.store.parent[id] or "")
            most = self.jobs.settings.limits.bytes
            if most and size > most:
                raise LimitExceeded(f"the layer would hold more than {most} bytes", limit=most)
            await self.disk.run(staging.swap_in, self.store, id, staged)
        finally:
            await self._discard(staged)
        return msgspec.structs.replace(result, size=size)

    def compared_with(self, chain: tuple[LayerId, ...]) -> tuple[LayerId, ...]:
        """As Content.compared_with: its parents, because it also holds what they hold."""
        return chain[1:]

    async def check_content(self, ids: list[LayerId]) -> list[Problem]:
        """As Content.check_content. No fingerprint is recorded for a snapshot."""
        return await check.content(self.store, self.table, self.disk, self.jobs, ids)

    async def _discard(self, staged: str) -> None:
        """Delete a staging. "" if there is none; a staging that fails deletes itself."""
        if staged:
            with trio.CancelScope(shield=True):
                await self.disk.run(removal.discard_staged, self.store, staged)
        self.deletion_due.set()

    def _xattrs(self) -> dict[str, bytes]:
        return dialects.xattrs(Dialect.NONE, self.store.xattr_namespace)

    def _content(self, id: LayerId) -> str:
        return self.store.layout.content(id)
