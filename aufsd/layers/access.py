"""The steps of a `get`: the only place where a layer's content is given to a caller.

A caller may write into the layer, unless it has children, is sealed, or was asked for read-only. So
before the first reference is counted, the fingerprint that an apply recorded is deleted, and a
btrfs subvolume is made writable or read-only. All of this happens within a transition of the id,
which create, apply, remove and convert of the same id wait for. The chain is read after the
transition has begun.
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
    """The parts that a `get` uses; it owns none."""

    mounts: Mounts
    chains: Chains
    content: Content
    disk: Disk
    # reads mount tables of other mount namespaces
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
        """Count one reference, and give the layer out on the first. The entry after that.

        `view`: the mounts that the caller sees. Raises LayerNotFound, LayerDamaged, LabelConflict,
        ModeConflict, MountFailed, ConversionNeeded, and what Identity.verify raises. Raises
        LayerInUse if a branch has to be converted and a mount of another backend has it, and
        PermissionDenied if the caller does not see the mount. Cancelled or failed: the count is as
        before, and nothing is left mounted.
        """
        entry = await self._count(id, reference, label, read_only=read_only)
        if view is not None and not view.is_near(anew=True):
            await self._require_seen(id, entry, reference, view)
        return entry

    async def _require_seen(
        self, id: LayerId, entry: Entry, reference: Reference, view: View
    ) -> None:
        """Drop the reference again if the caller finds another directory at the path.

        Whether a mount propagates to the caller's namespace is known only after it was made.
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
            return await self._give_out(chain, reference, label, asked_read_only=read_only)
        finally:
            table.end(id)

    async def _give_out(
        self, chain: tuple[LayerId, ...], reference: Reference, label: str, *, asked_read_only: bool
    ) -> Entry:
        """Give out the first layer of a chain, and count. The caller has begun its transition.

        `asked_read_only`: the call asks for read-only.
        """
        id, store = chain[0], self.mounts.store
        # no child is made during the transition: `create` waits for its end
        read_only = asked_read_only or is_frozen(store, id)
        store.identity.verify(writing=not read_only)
        if not self.content.needs_mount(chain, read_only=read_only):
            await self.disk.run(require_directory, store.layout.content(id), id)
            await self.content.before_giving_out(id, read_only=read_only)
            return self.mounts.count_content(
                id, reference, read_only=read_only, asked_read_only=asked_read_only
            )
        return await self._mount(
            chain, reference, label, read_only=read_only, asked_read_only=asked_read_only
        )

    async def _mount(
        self,
        chain: tuple[LayerId, ...],
        reference: Reference,
        label: str,
        *,
        read_only: bool,
        asked_read_only: bool,
    ) -> Entry:
        id, mounts = chain[0], self.mounts
        # a single layer is bind-mounted: there is no union, and no label of its own
        alone = len(chain) == 1
        backend = BIND if alone else mounts.backend.name
        label = "" if alone else label
        async with mounts.mounting(
            id, label=label, read_only=read_only, backend=backend, asked_read_only=asked_read_only
        ) as entry:
            opaque = frozenset() if alone else await self.chains.prepare(chain)
            for parent in filter(mounts.table.entries.__contains__, chain[1:]):
                # if it is mounted writable, its new hard links have to show here
                await mounts.flush(parent)
            await self.content.before_giving_out(id, read_only=read_only)
            try:
                return await mounts.mount(id, entry, reference, opaque=opaque)
            except MountFailed:
                for branch in chain:
                    # raises LayerDamaged if a branch is gone, which is then the reason
                    await self.disk.run(self.chains.dialect, branch)
                raise
