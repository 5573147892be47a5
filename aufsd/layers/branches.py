"""Converts a chain to the backend's dialect before a mount, and lists its branches for archives."""

from dataclasses import dataclass, field
from typing import Literal

import structlog

from aufsd.active.refs import BIND
from aufsd.active.table import Table
from aufsd.archive.requests import Branch
from aufsd.layers.background import Upkeep
from aufsd.store import whiteouts
from aufsd.store.dialect import Dialect, UnknownMark
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.store.opened import converting_to, damaged
from aufsd.store.seals import is_frozen
from aufsd.threads import Disk
from aufsd.union.backend import Backend
from aufsd_client.errors import ConversionNeeded

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Chains:
    """Remembers layers that it has looked at. Call `forget` before such a layer is changed."""

    store: Store
    backend: Backend
    table: Table
    disk: Disk
    upkeep: Upkeep
    policy: Literal["auto", "never"]
    # layer in the backend's dialect -> whether its root is opaque
    _roots: dict[LayerId, bool] = field(default_factory=dict)
    # to be looked at again: a user of fuse-overlayfs's mount can make the mark of an opaque root
    _written: set[LayerId] = field(default_factory=set)

    def forget(self, id: LayerId) -> None:
        """Forget a layer before its dialect changes, or it is removed."""
        self._roots.pop(id, None)

    def moved(self, id: LayerId, below: LayerId) -> None:
        """The content of a layer has moved to `below`, and the layer is empty."""
        if id in self._roots:
            self._roots[below] = self._roots[id]
            self._written.add(below)
        self._roots[id] = False

    def moved_back(self, id: LayerId, below: LayerId) -> None:
        """The content of `below` has moved back."""
        self.forget(id)
        if below in self._roots:
            self._roots[id] = self._roots.pop(below)

    def emptied(self, id: LayerId) -> bool:
        """A prepared layer was emptied. Whether its `/` was opaque."""
        opaque, self._roots[id] = self._roots[id], False
        return opaque

    def filled_again(self, id: LayerId, *, opaque: bool) -> None:
        """The layer has its old content again."""
        self._roots[id] = opaque

    async def prepare(self, chain: tuple[LayerId, ...]) -> frozenset[LayerId]:
        """Convert every branch of a chain to the backend's dialect, before the chain is mounted.

        The caller has begun the transition of the first. Waits for jobs that read a branch. Returns
        the branches with an opaque root. Raises ConversionNeeded, LayerDamaged. Raises LayerInUse
        if a mount of another backend, made before a restart, has the branch.
        """
        unknown = tuple(id for id in chain if id not in self._roots or id in self._written)
        if unknown:
            for id, dialect in (await self.disk.run(self._unprepared, unknown)).items():
                await self._convert(id, dialect, owned=id == chain[0])
            self._roots.update(await self.disk.run(self._opaque_roots, unknown))
            self._written.difference_update(unknown)
        if not is_frozen(self.store, chain[0]):
            self._written.add(chain[0])
        return frozenset(id for id in chain if self._roots[id])

    async def _convert(self, id: LayerId, dialect: Dialect, *, owned: bool) -> None:
        wanted = self.backend.dialect
        if self.policy == "never" and dialect is not wanted:
            command = f"aufsctl convert {id} --to {wanted}"
            raise ConversionNeeded(
                f"layer {id} is written for {dialect}, {self.backend.name} needs "
                f"{wanted}, and converting is off: run `{command}`",
                id=id,
                command=command,
            )
        # another chain with this branch may be about to be mounted too, and waits here
        if not owned:
            await self.table.claim(id)
        try:
            await self.table.wait_unread(id)
            self._refuse_mounted_otherwise(id)
            if await self.upkeep.convert(id, wanted):
                log.info("branch converted", id=id, dialect=str(wanted))
        finally:
            if not owned:
                self.table.end(id)

    def _refuse_mounted_otherwise(self, id: LayerId) -> None:
        for other, entry in self.table.entries.items():
            foreign = entry.mounted and entry.backend not in (self.backend.name, BIND)
            if foreign and id in self.store.chain(other):
                raise self.table.in_use(other)

    # --- in a thread --------------------------------------------------------------------------

    def dialect(self, id: LayerId) -> Dialect:
        """The dialect of a layer's whiteouts. Raises LayerDamaged if the content is missing."""
        self.store.identity.verify(writing=False)
        return self.store.dialect(id)

    def branches(self, chain: tuple[LayerId, ...]) -> tuple[Branch, ...]:
        """The branches of a chain, for an archive job."""
        self.store.identity.verify(writing=False)
        return tuple(Branch(id, self.store.dialect(id)) for id in chain)

    def _unprepared(self, ids: tuple[LayerId, ...]) -> dict[LayerId, Dialect]:
        """The layers to convert, with their dialect; those of an interrupted conversion too."""
        namespace, wanted = self.store.xattr_namespace, self.backend.dialect
        return {
            id: dialect
            for id in ids
            if (dialect := self.store.dialect(id)) is not wanted
            or converting_to(self.store.identity, id, namespace) is not None
        }

    def _opaque_roots(self, ids: tuple[LayerId, ...]) -> dict[LayerId, bool]:
        return {id: self._is_opaque_root(id) for id in ids}

    def _is_opaque_root(self, id: LayerId) -> bool:
        content, namespace = self.store.layout.content(id), self.store.xattr_namespace
        try:
            return whiteouts.is_opaque_root(content, self.backend.dialect, namespace)
        except UnknownMark as error:
            raise damaged(id, error.strerror) from error
