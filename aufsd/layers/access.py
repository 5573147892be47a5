"""What a `get` gives: the one place where a layer's content is given out.

Whoever is given a layer may write into it, unless other layers stand on it, it is sealed, or it was
asked for read-only. So before the first
reference counts, what an apply recorded of the content is taken back, and a subvolume of btrfs is
thawed or frozen. All of it happens in the transition of that one id, which create, apply, remove
and convert of the same id wait for, and which waits for them; the chain is read when that is held.
"""

import os
from dataclasses import dataclass, field

import trio

from aufsd.active.mounts import Mounts
from aufsd.active.refs import BIND, Entry, Reference
from aufsd.kernel.peer import View
from aufsd.layers.branches import Chains
from aufsd.layers.content import Content
from aufsd.store.identity import require_directory
from aufsd.store.ids import LayerId
from aufsd.store.seals import is_frozen
from aufsd.threads import Disk, Scans
from aufsd_client.errors import MountFailed, PermissionDenied


@dataclass(frozen=True, slots=True)
class Access:
    """Works on the rooms, owns none."""

    mounts: Mounts
    chains: Chains
    content: Content
    disk: Disk
    # mount tables of other namespaces
    scans: Scans = field(default_factory=lambda: Scans(2))

    async def get(
        self,
        id: LayerId,
        reference: Reference,
        *,
        label: str,
        view: View | None = None,
        read_only: bool = False,
    ) -> Entry:
        """Count one reference, and give the layer out on the first; the entry as it is then.

        `view`: what who asks sees of our mounts. Raises LayerNotFound, LayerDamaged, LabelConflict,
        ModeConflict, MountFailed, ConversionNeeded, LayerInUse (a branch in another dialect that a
        mount of another backend stands on), PermissionDenied (who asks does not see it), and what
        Identity.verify raises. Cancelled or failed: the count is as before, and nothing is left
        mounted.
        """
        entry = await self._count(id, reference, label, read_only=read_only)
        if view is not None and not view.is_near(anew=True):
            await self._require_seen(id, entry, reference, view)
        return entry

    async def _require_seen(
        self, id: LayerId, entry: Entry, reference: Reference, view: View
    ) -> None:
        """Take the reference back if who asked for it would find another directory at the path.

        Whether a mount reaches another namespace is seen when it is there, and not before.
        """
        layout, seen = self.mounts.store.layout, False
        path = layout.mount_point(id) if entry.mounted else layout.content(id)
        try:
            seen = await self.scans.run(view.sees, path)
        finally:
            if not seen:
                with trio.CancelScope(shield=True):
                    await self.mounts.take_back(id, reference)
        if not seen:
            raise PermissionDenied(
                f"process {view.pid} is in another mount namespace than the daemon, and finds "
                f"something else than layer {id} at {path}; run it in the daemon's (nsenter -m "
                f"-t {os.getpid()}), or in one that gets its mounts (unshare --propagation "
                "slave, where the store lies on a shared mount)",
                id=id,
                path=path,
            )
        view.remember((id, entry.mount))

    async def _count(
        self, id: LayerId, reference: Reference, label: str, *, read_only: bool
    ) -> Entry:
        table, store = self.mounts.table, self.mounts.store
        while True:
            entry = self.mounts.get_now(id, reference, label=label, read_only=read_only)
            if entry is not None:
                return entry
            with table.locked():
                waiting = table.in_transition(id)
                if waiting is None:
                    chain = store.chain(id)
                    waiting = table.in_transition(*chain)
                if waiting is None:
                    table.begin(id)
                    break
            await waiting.wait()
        try:
            return await self._give_out(chain, reference, label, asked=read_only)
        finally:
            table.end(id)

    async def _give_out(
        self, chain: tuple[LayerId, ...], reference: Reference, label: str, *, asked: bool
    ) -> Entry:
        """Give out a layer whose transition the caller holds, and count.

        `asked`: read-only is what is asked for.
        """
        id, store = chain[0], self.mounts.store
        # no child comes while the transition is held, for create waits for that
        read_only = asked or is_frozen(store, id)
        store.identity.verify(writing=not read_only)
        if not self.content.needs_mount(chain, read_only=read_only):
            await self.disk.run(require_directory, store.layout.content(id), id)
            await self.content.prepare_to_give(id, read_only=read_only)
            return self.mounts.count_content(
                id, reference, read_only=read_only, asked_read_only=asked
            )
        return await self._mount(chain, reference, label, read_only=read_only, asked=asked)

    async def _mount(
        self,
        chain: tuple[LayerId, ...],
        reference: Reference,
        label: str,
        *,
        read_only: bool,
        asked: bool,
    ) -> Entry:
        id, mounts = chain[0], self.mounts
        # one alone is no union: its content is shown, and has no label of its own
        alone = len(chain) == 1
        backend = BIND if alone else mounts.backend.name
        label = "" if alone else label
        async with mounts.mounting(
            id, label=label, read_only=read_only, backend=backend, asked_read_only=asked
        ) as entry:
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
