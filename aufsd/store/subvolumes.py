"""Checkpoint and roll back of layers that are subvolumes (btrfs). Nothing is copied.

A checkpoint is a snapshot that becomes read-only: the layer itself stays where it is, also under
processes that use it, and changes no more than its parent. The steps, with `snapshot:ID` in staging
as the marker, which is the parents file that the layer will have:

    prepared   marker and snapshot in staging
    commit     the snapshot becomes diff/BELOW
    after      layers/ID becomes layers/BELOW; marks on the content; the marker becomes layers/ID

A roll back puts a new snapshot in the layer's place, by the steps of replacing.py. Synchronous; the
caller holds the transitions of all ids.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Literal

from aufsd.kernel import btrfs, syscalls
from aufsd.store import content as contents
from aufsd.store import dialect as dialects
from aufsd.store import removal, staging
from aufsd.store.content import fsync
from aufsd.store.dialect import Dialect, XattrNamespace
from aufsd.store.format import write_durably
from aufsd.store.ids import LayerId, is_id
from aufsd.store.index import parent_mark, read_parents
from aufsd.store.layers import Store
from aufsd.store.layout import Layout
from aufsd.store.origin import Origin, read_origin, write_origin
from aufsd.store.replacing import (
    Move,
    Prepared,
    Resumed,
    make_mount_point,
    prepare_staged,
    require_free,
)
from aufsd.store.seals import OPEN, SEALED

_MARKER: Final = "snapshot:"
_SNAPSHOT: Final = "snapshot-of:"


@dataclass(frozen=True, slots=True)
class Parting:
    """The paths of one checkpoint: of the layer `id`, below which `below` comes to be."""

    layout: Layout
    namespace: XattrNamespace
    id: LayerId
    below: LayerId

    @property
    def marker(self) -> str:
        """The parents file to come."""
        return f"{self.layout.staging}/{_MARKER}{self.id}"

    @property
    def snapshot(self) -> str:
        """The content of `below` before the commit."""
        return f"{self.layout.staging}/{_SNAPSHOT}{self.id}"

    @property
    def begun(self) -> bool:
        """Whether the commit was made, and what comes after it is not done."""
        there, layout = os.path.lexists, self.layout
        return (
            there(self.marker)
            and there(layout.content(self.below))
            and there(layout.parents_file(self.below)) is not there(layout.parents_file(self.id))
        )


def checkpoint(store: Store, id: LayerId, below: LayerId) -> None:
    """Make what a layer holds the sealed layer `below`, which it then stands on.

    `below` is in the index already, on the parent of `id`. All or nothing, durable by the policy.
    LayerExists if something lies where `below` would, OSError: nothing was done, or, if not even
    that could be had, the next start finishes it.
    """
    layout = store.layout
    require_free(store, below)
    parting = Parting(layout, store.xattr_namespace, id, below)
    parents = (below, *store.chain(below)[1:])
    try:
        make_mount_point(store, below)
        contents.snapshot(layout.content(id), parting.snapshot)
        made = os.lstat(layout.parents_file(id))
        write_durably(parting.marker, "".join(f"{each}\n" for each in parents), store.sync)
        # it says when the layer was made
        os.utime(parting.marker, ns=(made.st_atime_ns, made.st_mtime_ns))
        if store.sync != "none":
            for path in (layout.mnt, layout.staging):
                fsync(path)
        _rename(parting.snapshot, layout.content(below))
        _finish(parting)
        if store.sync != "none":
            fsync(layout.diff)
            fsync(layout.layers)
    except BaseException:
        _take_back(store, parting)
        raise
    store.created[below] = os.lstat(layout.parents_file(below)).st_mtime


def _finish(parting: Parting) -> None:
    """Go the steps after the commit that are left."""
    layout, id, below = parting.layout, parting.id, parting.below
    record, content = layout.parents_file(below), layout.content(below)
    if not os.path.lexists(record):
        _rename(layout.parents_file(id), record)
    os.chmod(record, SEALED)
    os.utime(record)
    apart = contents.state(content)
    # neither of the two was changed since that transaction, but for these marks on their tops
    origin = Origin(apart.uuid, apart.created, apart.created)
    namespace = parting.namespace
    mark(layout.content(id), parent_mark(below, namespace), origin, namespace)
    contents.freeze(content, True)
    os.rename(parting.marker, layout.parents_file(id))


def mark(
    content: str, marks: dict[str, bytes], origin: Origin | None, namespace: XattrNamespace
) -> None:
    """Write on a subvolume, also a read-only one, what it was made on, and from which state."""
    with _writable(content):
        for name, value in marks.items():
            os.setxattr(content, name, value)
        if origin is not None:
            write_origin(content, origin, namespace)


@contextmanager
def _writable(content: str) -> Iterator[None]:
    """A subvolume that takes xattrs, as a layer that is given out read-only does not."""
    fd = os.open(content, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        frozen = btrfs.is_read_only(fd)
        if frozen:
            btrfs.set_read_only(fd, False)
        try:
            yield
        finally:
            if frozen:
                btrfs.set_read_only(fd, True)
    finally:
        os.close(fd)


def _take_back(store: Store, parting: Parting) -> None:
    """Go back from wherever it is. Raises OSError; the next start decides then."""
    layout, id, below = parting.layout, parting.id, parting.below
    record, content = layout.parents_file(below), layout.content(below)
    if os.path.lexists(content):
        contents.thaw(content)
        # it was made before they were
        above = store.parent[below]
        origin = read_origin(content, parting.namespace)
        namespace = parting.namespace
        mark(layout.content(id), parent_mark(above, namespace), origin, namespace)
        if os.path.lexists(record):
            if not os.path.lexists(parting.marker):
                os.rename(layout.parents_file(id), parting.marker)
            made = os.lstat(parting.marker)
            os.chmod(record, OPEN)
            os.utime(record, ns=(made.st_atime_ns, made.st_mtime_ns))
            _rename(record, layout.parents_file(id))
        _rename(content, parting.snapshot)
        if store.sync != "none":
            fsync(layout.layers)
            fsync(layout.diff)
    for path in (parting.snapshot, parting.marker):
        removal.discard_staged(store, path)
    with suppress(OSError):
        os.rmdir(layout.mount_point(below))


def _rename(source: str, target: str) -> None:
    at = syscalls.AT_FDCWD
    syscalls.renameat2(at, source, at, target, syscalls.RENAME_NOREPLACE)


def resume(layout: Layout, namespace: XattrNamespace) -> Iterator[Resumed]:
    """Finish or undo what a crash cut off, before the index is read. Safe to be cut off itself."""
    for name in sorted(os.listdir(layout.staging)):
        if name.startswith(_MARKER) and is_id(id := name.removeprefix(_MARKER)):
            try:
                yield Resumed(_resume(layout, namespace, LayerId(id)), "checkpoint", id)
            except OSError as error:
                yield Resumed("failed", f"checkpoint: {error.strerror}", error.filename or "")


def _resume(
    layout: Layout, namespace: XattrNamespace, id: LayerId
) -> Literal["finished", "undone"]:
    marker = f"{layout.staging}/{_MARKER}{id}"
    parents = read_parents(marker)
    if isinstance(parents, str) or not parents:
        # cut off while it was written
        os.unlink(marker)
        return "undone"
    parting = Parting(layout, namespace, id, LayerId(parents[0]))
    if parting.begun:
        _finish(parting)
        return "finished"
    os.unlink(marker)
    if not os.path.lexists(layout.parents_file(parting.below)):
        with suppress(OSError):
            os.rmdir(layout.mount_point(parting.below))
    return "undone"


# --- roll back --------------------------------------------------------------------------------


def stage_rollback(store: Store, id: LayerId, to: LayerId | None) -> str:
    """A new subvolume in staging with what `to` holds, or nothing, and the limit of `id`; its path.

    Raises OSError; then there is none.
    """
    size = contents.limit_of(store.layout.content(id), store.xattr_namespace)
    return staging.stage_child(store, to, size)


def prepare_rollback(
    store: Store, id: LayerId, parents: Sequence[LayerId], staged: str
) -> Prepared:
    """What is to put the subvolume `staged` in the place of the layer's, for `replacing.commit`.

    OSError: nothing was done, and `staged` is gone.
    """
    move = Move(store.layout, "rollback", id)
    try:
        os.rename(staged, move.fresh)
        marks = parent_mark(parents[0] if parents else None, store.xattr_namespace)
        xattrs = dialects.xattrs(Dialect.NONE, store.xattr_namespace)
        for name, value in {**xattrs, **marks}.items():
            os.setxattr(move.fresh, name, value)
        if parents:
            above = store.layout.content(parents[0])
            contents.note_origin(move.fresh, above, store.xattr_namespace)
        # nobody can rename one that is read-only
        contents.thaw(store.layout.content(id))
        return prepare_staged(store, move, parents)
    except BaseException:
        for path in (staged, move.fresh, move.marker):
            removal.discard_staged(store, path)
        raise
