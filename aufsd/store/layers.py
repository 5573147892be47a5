"""An open store, and its index: which layers there are, and their parents and children.

`layers/<id>` lists the parents of a layer, nearest first, one a line, as Docker's driver writes it.
The layer exists when that file does. The index is read once, when the store is opened. After that
no operation reads more than its own layer.

What changes the disk is in creation.py, staging.py and removal.py. It is synchronous: the daemon
calls it in a thread, and never two functions for one id at the same time.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from aufsd.store import records
from aufsd.store.dialect import Dialect, XattrNamespace, is_settled
from aufsd.store.format import Format, Sync, write_format
from aufsd.store.identity import Identity
from aufsd.store.ids import LayerId
from aufsd.store.layout import Layout
from aufsd.store.opened import content_of, dialect_of
from aufsd_client.errors import LayerDamaged, LayerExists, LayerNotFound, MountFailed


@dataclass(slots=True)
class Store:
    """An open store: its locks, and the index of its layers.

    `parent` is None for a base layer. `damaged` has the layers whose record on disk is wrong, with
    the reason; they are not in `parent`. The store owns the descriptors of its locks until `close`;
    the processes of archive jobs inherit `jobs_fd`. `resumed`: action, what and id, for
    recovery.py.
    """

    layout: Layout
    sync: Sync
    uid: int
    gid: int
    format: Format
    xattr_namespace: XattrNamespace
    lock_fd: int
    jobs_fd: int
    identity: Identity
    parent: dict[LayerId, LayerId | None] = field(default_factory=dict)
    children: dict[LayerId, set[LayerId]] = field(default_factory=dict)
    damaged: dict[LayerId, str] = field(default_factory=dict)
    # when each layer was made, in seconds since the epoch: the time of its parents file
    created: dict[LayerId, float] = field(default_factory=dict)
    # layers whose content never changes again (seals.py)
    sealed: set[LayerId] = field(default_factory=set)
    # layers that are known to have no recorded fingerprint
    unrecorded: set[LayerId] = field(default_factory=set)
    resumed: Sequence[tuple[str, str, str]] = ()
    # how many removed layers have content that could not be deleted
    undeleted: int = 0
    # stagings that could not be moved to `removing`; `removal.erase_removed` tries again
    undiscarded: list[str] = field(default_factory=list)
    # for names in staging and removing
    serial: "itertools.count[int]" = field(default_factory=itertools.count)

    # --- the index ----------------------------------------------------------------------------

    def exists(self, id: LayerId) -> bool:
        """Whether there is a layer of this id, damaged or not."""
        return id in self.parent or id in self.damaged

    def require(self, id: LayerId) -> None:
        """Raise LayerNotFound or LayerDamaged if there is no usable layer of this id."""
        if id in self.damaged:
            raise LayerDamaged(
                f"layer {id} is in quarantine: {self.damaged[id]}",
                id=id,
                problem=self.damaged[id],
            )
        if id not in self.parent:
            raise LayerNotFound(f"there is no layer {id}", id=id)

    def chain(self, id: LayerId) -> tuple[LayerId, ...]:
        """The layer and its parents, nearest first."""
        found = []
        above: LayerId | None = id
        try:
            while above is not None:
                found.append(above)
                above = self.parent[above]
        except KeyError:
            self.require(found[-1])
            raise
        return tuple(found)

    def children_of(self, id: LayerId) -> frozenset[LayerId]:
        """The layers whose parent is this one."""
        return frozenset(self.children.get(id, ()))

    def register(self, id: LayerId, parent: LayerId | None) -> None:
        """Put a layer into the index. Raises LayerExists."""
        if self.exists(id):
            raise LayerExists(f"layer {id} exists already", id=id)
        self.parent[id] = parent
        if parent is not None:
            self.children.setdefault(parent, set()).add(id)

    def forget(self, id: LayerId) -> None:
        """Take a layer out of the index."""
        above = self.parent.pop(id, None)
        self.created.pop(id, None)
        self.sealed.discard(id)
        self.unrecorded.discard(id)
        if self.damaged.pop(id, None) is not None:
            above = next((other for other, made in self.children.items() if id in made), None)
        if above is not None:
            self.children[above].discard(id)
            if not self.children[above]:
                del self.children[above]

    # --- content ------------------------------------------------------------------------------

    def dialect(self, id: LayerId) -> Dialect:
        """The dialect of the layer's whiteouts. Raises LayerDamaged without content."""
        return dialect_of(self.identity, id, self.xattr_namespace)

    def settled_on(self, id: LayerId) -> list[LayerId]:
        """Layers above whose whiteouts depend on this one's content (dialect.mark_settled)."""
        found = []
        pending = list(self.children_of(id))
        while pending:
            above = pending.pop()
            pending += self.children_of(above)
            with contextlib.suppress(OSError, LayerDamaged), content_of(self.identity, above) as fd:
                if is_settled(fd, self.xattr_namespace):
                    found.append(above)
        return sorted(found)

    def recorded(self, id: LayerId) -> str:
        """The fingerprint that an apply has recorded; "" if there is none. Raises LayerDamaged."""
        with content_of(self.identity, id) as fd:
            return records.read(fd, self.xattr_namespace)

    def unrecord(self, id: LayerId) -> None:
        """Delete the recorded fingerprint from the disk, before a caller may write into the layer.

        Raises LayerDamaged, MountFailed; then the layer must not be given out.
        """
        if id in self.unrecorded:
            return
        self.identity.verify()
        try:
            with content_of(self.identity, id) as fd:
                records.drop(fd, self.xattr_namespace, self.sync)
        except OSError as error:
            raise MountFailed(
                f"layer {id} cannot be made ready for being written to: {error.strerror}",
                id=id,
                errno=errno.errorcode.get(error.errno or 0, "EIO"),
            ) from error
        self.unrecorded.add(id)

    # --- the store as a whole -----------------------------------------------------------------

    def set_backend(self, name: str) -> None:
        """Record which backend serves the store, for the next start's choice."""
        if self.format.backend != name:
            self.format.backend = name
            write_format(self.layout, self.format, self.sync)

    def close(self) -> None:
        """Release the locks."""
        self.identity.close()
        os.close(self.jobs_fd)
        os.close(self.lock_fd)
