"""What a `get` gives: the one place where a layer's content is given out.

Whoever is given a layer may write into it, unless other layers stand on it. So before the first
reference counts, what an apply recorded of the content is taken back, and a subvolume of btrfs is
thawed or frozen. All of it happens in the transition of that one id, which create, apply, remove
and convert of the same id wait for, and which waits for them; the chain is read when that is held.
"""

from dataclasses import dataclass

from aufsd.active.mounts import Mounts
from aufsd.active.refs import BIND, Entry, Reference
from aufsd.layers.branches import Chains
from aufsd.layers.content import Content
from aufsd.store.ids import LayerId
from aufsd.threads import Disk
from aufsd_client.errors import MountFailed


@dataclass(frozen=True, slots=True)
class Access:
    """Works on the rooms, owns none."""

    mounts: Mounts
    chains: Chains
    content: Content
    disk: Disk

    async def get(self, id: LayerId, reference: Reference, *, label: str) -> Entry:
        """Count one reference, and give the layer out on the first; the entry as it is then.

        Raises LayerNotFound, LayerDamaged, LabelConflict, MountFailed, ConversionNeeded, LayerInUse
        (a branch in another dialect that a mount of another backend stands on). Cancelled or
        failed: the count is as before, and nothing is left mounted.
        """
        table, store = self.mounts.table, self.mounts.store
        while True:
            entry = self.mounts.get_now(id, reference, label=label)
            if entry is not None:
                return entry
            with table.locked():
                waiting = table.moving(id)
                if waiting is None:
                    chain = store.chain(id)
                    waiting = table.moving(*chain)
                if waiting is None:
                    table.begin(id)
                    break
            await waiting.wait()
        try:
            return await self._give_out(chain, reference, label)
        finally:
            table.end(id)

    async def _give_out(
        self, chain: tuple[LayerId, ...], reference: Reference, label: str
    ) -> Entry:
        """Give out a layer whose transition the caller holds, and count."""
        id, store = chain[0], self.mounts.store
        # none comes while the transition is held, for create waits for that
        read_only = bool(store.children_of(id))
        if not self.content.needs_mount(chain, read_only=read_only):
            await self.content.prepare_to_give(id, read_only=read_only)
            return self.mounts.count_content(id, reference, read_only=read_only)
        return await self._mount(chain, reference, label, read_only=read_only)

    async def _mount(
        self, chain: tuple[LayerId, ...], reference: Reference, label: str, *, read_only: bool
    ) -> Entry:
        id, mounts = chain[0], self.mounts
        # one alone is no union: its content is shown, and has no label of its own
        alone = len(chain) == 1
        backend = BIND if alone else mounts.backend.name
        label = "" if alone else label
        async with mounts.mounting(id, label=label, read_only=read_only, backend=backend) as entry:
            opaque = frozenset() if alone else await self.chains.prepare(chain)
            for parent in filter(mounts.table.entries.__contains__, chain[1:]):
                # one that is mounted writable: what it changed shows here under all its names
                await mounts.flush(parent)
            await self.content.prepare_to_give(id, read_only=read_only)
            try:
                return await mounts.mount(id, entry, reference, opaque=opaque)
            except MountFailed:
                for branch in chain:
                    # raises the reason, if it is that a branch is gone
                    await self.disk.run(self.chains.dialect, branch)
                raise
