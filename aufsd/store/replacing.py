"""Takes a layer's own content out of it, and leaves it empty.

At a checkpoint the content becomes that of a new layer, which becomes the layer's parent. At a
rollback the content is thrown away, and the layer may get another parent. Nothing is copied.
Directories and parents files are renamed in the order below, and a marker shows that it is going
on. The marker is the new parents file of the layer.

    prepared   marker and fresh content in staging, while the layer may still be mounted
    commit     diff/ID is renamed out
    after      fresh content becomes diff/ID; layers/ID is renamed out; the marker becomes layers/ID

The first step makes everything that needs disk space or a descriptor, so that little can fail once
the layer is unmounted.

While the marker is there, the place of the old content shows whether a crash was before or after
the commit. To undo, the same steps go backwards, so a crash then leaves no other state. A start
recovers before it reads the index. Synchronous. The caller has begun the transitions of all ids.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from aufsd.kernel import syscalls
from aufsd.kernel.beneath import DIRECTORY
from aufsd.store import dialect as dialects
from aufsd.store import removal
from aufsd.store.content import copy_attributes, fsync, is_copied
from aufsd.store.dialect import Dialect
from aufsd.store.format import write_durably
from aufsd.store.ids import LayerId, is_id
from aufsd.store.index import parent_mark, read_parents
from aufsd.store.layers import Store
from aufsd.store.layout import Layout
from aufsd.store.seals import OPEN, SEALED
from aufsd_client.errors import LayerExists

Kind = Literal["checkpoint", "rollback", "squash"]
_KINDS: Final[tuple[Kind, ...]] = ("checkpoint", "rollback", "squash")
# begins a name in staging, before the id; no id has a colon
_FRESH: Final = "fresh:"
_CONTENT: Final = "old-content:"
_RECORD: Final = "old-record:"


@dataclass(frozen=True, slots=True)
class Move:
    """The paths of one replacement: of the layer `id`, whose own content becomes that of `below`.

    `below` is None where it goes, as it does in all but a checkpoint.
    """

    layout: Layout
    kind: Kind
    id: LayerId
    below: LayerId | None = None

    @property
    def marker(self) -> str:
        """The new parents file."""
        return f"{self.layout.staging}/{self.kind}:{self.id}"

    @property
    def fresh(self) -> str:
        """The new content."""
        return f"{self.layout.staging}/{_FRESH}{self.id}"

    @property
    def content(self) -> str:
        """The new place of the old content."""
        if self.below is not None:
            return self.layout.content(self.below)
        return f"{self.layout.staging}/{_CONTENT}{self.id}"

    @property
    def record(self) -> str:
        """The new place of the old parents file."""
        if self.below is not None:
            return self.layout.parents_file(self.below)
        return f"{self.layout.staging}/{_RECORD}{self.id}"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A replacement that is ready for its commit; closed when that is done, or taken back.

    `like` is the directory whose attributes the fresh content has; "" for those of a base layer.
    `changed` is its st_ctime_ns when they were copied.
    """

    store: Store
    move: Move
    like: str
    changed: int
    fresh_fd: int
    diff_fd: int
    layers_fd: int

    def close(self) -> None:
        """Close its descriptors."""
        for fd in (self.fresh_fd, self.diff_fd, self.layers_fd):
            os.close(fd)


def prepare_checkpoint(store: Store, id: LayerId, below: LayerId, dialect: Dialect) -> Prepared:
    """What is to make the content of a layer the sealed layer `below`, which it then stands on.

    `below` is in the index already, on the parent of `id`. LayerExists if something lies where
    `below` would, OSError: nothing was done.
    """
    require_free(store, below)
    parents = (below, *store.chain(below)[1:])
    move = Move(store.layout, "checkpoint", id, below)
    return _prepare(store, move, parents, dialect, store.layout.content(id))


def require_free(store: Store, below: LayerId) -> None:
    """Raise LayerExists if something lies where a new layer would come to be."""
    layout = store.layout
    for path in (layout.parents_file(below), layout.content(below)):
        if os.path.lexists(path):
            raise LayerExists(
                f"there is no layer {below}, but {path} exists; `aufsctl check` says more", id=below
            )
    if os.path.lexists(layout.removal(below)):
        removal.finish_removal(store, below)


def prepare_rollback(
    store: Store, id: LayerId, parents: Sequence[LayerId], dialect: Dialect
) -> Prepared:
    """What is to empty a layer, and to put it on these parents. OSError: nothing was done.

    What is thrown away stays in staging until `discard_old`.
    """
    like = store.layout.content(parents[0]) if parents else ""
    return _prepare(store, Move(store.layout, "rollback", id), parents, dialect, like)


def commit(ready: Prepared) -> None:
    """Do what was prepared: all or nothing, durable by the policy. Opens nothing.

    OSError: nothing was done, or if not even that could be had, it is in between (`is_between`).
    """
    store, move = ready.store, ready.move
    try:
        _freshen(ready)
        _commit(move)
        if store.sync != "none":
            os.fsync(ready.diff_fd)
            os.fsync(ready.layers_fd)
    except BaseException:
        take_back(ready)
        raise
    if move.below is not None:
        made = os.lstat(store.layout.parents_file(move.below))
        store.created[move.below] = made.st_mtime


def take_back(ready: Prepared) -> None:
    """Undo what was prepared, or even done. Opens nothing. OSError: it is in between, as it was."""
    _take_back(ready.store, ready.move)
    if ready.store.sync != "none":
        os.fsync(ready.layers_fd)
        os.fsync(ready.diff_fd)


def is_between(move: Move) -> bool:
    """Whether a replacement was begun and not finished. Then call `finish`."""
    return os.path.lexists(move.marker) and os.path.lexists(move.content)


def finish(store: Store, move: Move) -> None:
    """Do the rest of what could neither be done nor taken back. OSError: it is as it was."""
    if is_between(move):
        _commit(move)
    if store.sync != "none":
        fsync(move.layout.diff)
        fsync(move.layout.layers)
    if move.below is not None:
        store.created[move.below] = os.lstat(move.layout.parents_file(move.below)).st_mtime


def discard_old(store: Store, id: LayerId) -> None:
    """Discard the content that a rollback or a squash has taken out."""
    move = Move(store.layout, "rollback", id)
    for path in (move.content, move.record):
        removal.discard_staged(store, path)


def checkpoint_in_index(store: Store, id: LayerId, below: LayerId) -> None:
    """Enter a checkpoint in the index. Not in a thread, as every change of the index."""
    store.sealed.add(below)
    if id in store.unrecorded:
        store.unrecorded.add(below)
    restand(store, id, below)


def checkpoint_out_of_index(store: Store, id: LayerId, below: LayerId) -> None:
    """Undo that; `below` stays in the index."""
    restand(store, id, store.parent[below])
    if below not in store.unrecorded:
        store.unrecorded.discard(id)


def restand(store: Store, id: LayerId, parent: LayerId | None) -> None:
    """Give a layer, which is empty now, another parent in the index."""
    above = store.parent[id]
    if above is not None:
        store.children[above].discard(id)
        if not store.children[above]:
            del store.children[above]
    store.parent[id] = parent
    if parent is not None:
        store.children.setdefault(parent, set()).add(id)
    store.unrecorded.add(id)


def _prepare(
    store: Store, move: Move, parents: Sequence[LayerId], dialect: Dialect, like: str
) -> Prepared:
    try:
        if move.below is not None:
            make_mount_point(store, move.below)
        changed = os.lstat(like).st_ctime_ns if like else 0
        _stage(store, move, parents[0] if parents else None, dialect, like)
        return prepare_staged(store, move, parents, like, changed)
    except BaseException:
        _take_back(store, move)
        raise


def prepare_staged(
    store: Store, move: Move, parents: Sequence[LayerId], like: str = "", changed: int = 0
) -> Prepared:
    """The rest of it, once the fresh content is in staging. OSError: that, and a marker, stay."""
    layout, opened = store.layout, list[int]()
    made = os.lstat(layout.parents_file(move.id))
    write_durably(move.marker, "".join(f"{parent}\n" for parent in parents), store.sync)
    # it says when the layer was made
    os.utime(move.marker, ns=(made.st_atime_ns, made.st_mtime_ns))
    try:
        for path in (move.fresh, layout.diff, layout.layers):
            opened.append(os.open(path, DIRECTORY))
        if store.sync != "none":
            os.fsync(opened[0])
            for path in (layout.mnt, layout.staging):
                fsync(path)
        return Prepared(store, move, like, changed, *opened)
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise


def _freshen(ready: Prepared) -> None:
    """Give the fresh content the attributes that its model has got since it was prepared."""
    if not ready.like or os.lstat(ready.like).st_ctime_ns == ready.changed:
        return
    fresh = ready.move.fresh
    for name in os.listxattr(fresh):
        if is_copied(name):
            os.removexattr(fresh, name)
    copy_attributes(ready.like, fresh)
    if ready.store.sync != "none":
        os.fsync(ready.fresh_fd)


def make_mount_point(store: Store, id: LayerId) -> None:
    """Have the directory in mnt/ of a new layer. Raises OSError."""
    path = store.layout.mount_point(id)
    with suppress(FileExistsError):
        os.mkdir(path, 0o755)
    os.chown(path, store.uid, store.gid)
    os.chmod(path, 0o755)


def _stage(store: Store, move: Move, parent: LayerId | None, dialect: Dialect, like: str) -> None:
    namespace = store.xattr_namespace
    os.mkdir(move.fresh, 0o700)
    if like:
        copy_attributes(like, move.fresh)
    else:
        os.chown(move.fresh, store.uid, store.gid)
        os.chmod(move.fresh, 0o755)
    marks = parent_mark(parent, namespace)
    for name, value in {**dialects.xattrs(dialect, namespace), **marks}.items():
        os.setxattr(move.fresh, name, value)


def _commit(move: Move) -> None:
    """Go the steps that are left, whichever those are; the marker is there."""
    layout, id = move.layout, move.id
    if not os.path.lexists(move.content):
        _rename(layout.content(id), move.content)
    if os.path.lexists(move.fresh):
        _rename(move.fresh, layout.content(id))
    if not os.path.lexists(move.record):
        _rename(layout.parents_file(id), move.record)
    if move.below is not None:
        os.chmod(move.record, SEALED)
        os.utime(move.record)
    os.rename(move.marker, layout.parents_file(id))


def _take_back(store: Store, move: Move) -> None:
    """Go back from wherever it is. Raises OSError; the next start decides then."""
    layout, id = move.layout, move.id
    if os.path.lexists(move.content):
        if os.path.lexists(move.record):
            if not os.path.lexists(move.marker):
                os.rename(layout.parents_file(id), move.marker)
            if move.below is not None:
                made = os.lstat(move.marker)
                os.chmod(move.record, OPEN)
                os.utime(move.record, ns=(made.st_atime_ns, made.st_mtime_ns))
            _rename(move.record, layout.parents_file(id))
        if os.path.lexists(layout.content(id)):
            _rename(layout.content(id), move.fresh)
        _rename(move.content, layout.content(id))
    # a marker that stays is of something that did not begin
    for path in (move.fresh, move.marker):
        removal.discard_staged(store, path)
    if move.below is not None:
        with suppress(OSError):
            os.rmdir(layout.mount_point(move.below))


def _rename(source: str, target: str) -> None:
    at = syscalls.AT_FDCWD
    syscalls.renameat2(at, source, at, target, syscalls.RENAME_NOREPLACE)


class Resumed(NamedTuple):
    """What a start did about a replacement that was cut off; `failed`: `what` says why."""

    action: Literal["finished", "undone", "failed"]
    what: str
    name: str


def resume(layout: Layout) -> Iterator[Resumed]:
    """Finish or undo what a crash has interrupted, before the index is read."""
    told: set[str] = set()
    names = sorted(os.listdir(layout.staging))
    for name in names:
        kind, _, id = name.partition(":")
        for known in _KINDS:
            if kind == known and is_id(id):
                try:
                    yield Resumed(_resume(layout, known, LayerId(id)), known, id)
                except OSError as error:
                    yield Resumed("failed", f"{known}: {error.strerror}", error.filename or "")
                told.add(id)
    for serial, name in enumerate(names):
        kind, colon, id = name.partition(":")
        if kind + colon in (_FRESH, _CONTENT, _RECORD):
            with suppress(OSError):
                os.rename(f"{layout.staging}/{name}", f"{layout.removing}/{os.getpid()}.r{serial}")
                if kind + colon == _CONTENT and id not in told:
                    yield Resumed("finished", "rollback", id)


def _resume(layout: Layout, kind: Kind, id: LayerId) -> Literal["finished", "undone"]:
    marker = f"{layout.staging}/{kind}:{id}"
    below: LayerId | None = None
    if kind == "checkpoint":
        parents = read_parents(marker)
        if isinstance(parents, str) or not parents:
            # cut off while it was written
            os.unlink(marker)
            return "undone"
        below = LayerId(parents[0])
    move, there = Move(layout, kind, id, below), os.path.lexists
    # of each two one is there at every step; else the marker is an old one that could not go
    begun = (
        there(move.content)
        and there(move.fresh) is not there(layout.content(id))
        and there(move.record) is not there(layout.parents_file(id))
    )
    if begun:
        _commit(move)
        return "finished"
    os.unlink(marker)
    if below is not None and not there(layout.parents_file(below)):
        with suppress(OSError):
            os.rmdir(layout.mount_point(below))
    return "undone"
