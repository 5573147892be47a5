"""Content that is made in `.aufsd/staging`, and swapped into a layer by one rename. Synchronous."""

import contextlib
import os
from collections.abc import Iterator, Mapping

from aufsd.kernel import syscalls
from aufsd.store import content as contents
from aufsd.store import records, removal
from aufsd.store.content import copy_attributes, fsync
from aufsd.store.dialect import mark_settled
from aufsd.store.identity import require_directory
from aufsd.store.ids import LayerId
from aufsd.store.index import parent_mark
from aufsd.store.layers import Store


def stage(store: Store, id: LayerId, xattrs: Mapping[str, bytes]) -> str:
    """Make an empty directory in staging, with the attributes of the layer's own. Its path.

    Raises OSError, and leaves none.
    """
    with _staged(store) as path:
        os.mkdir(path, 0o700)
        copy_attributes(store.layout.content(id), path)
        mark(store, path, store.parent[id], xattrs)
    return path


def stage_snapshot(store: Store, id: LayerId, xattrs: Mapping[str, bytes]) -> str:
    """Make a snapshot of the layer's subvolume in staging, with its limit. Its path.

    Raises OSError, and leaves none.
    """
    with _staged(store) as path:
        contents.snapshot(store.layout.content(id), path)
        size = contents.limit_of(path, store.xattr_namespace)
        contents.limit(path, size, store.xattr_namespace)
        mark(store, path, store.parent[id], xattrs)
    return path


def mark(store: Store, path: str, parent: LayerId | None, xattrs: Mapping[str, bytes]) -> None:
    """Set the layer's xattrs on its directory, and the mark of its parent."""
    marks = parent_mark(parent, store.xattr_namespace)
    for name, value in {**xattrs, **marks}.items():
        os.setxattr(path, name, value)


def stage_child(store: Store, parent: LayerId | None, size: int, content: str = "") -> str:
    """Make a subvolume in staging for a new layer, with the content of its parent. Its path.

    `size`: the most bytes that it may have, 0 for no limit. `content`: the subvolume to clone, if
    not the parent's. Raises OSError, and leaves none.
    """
    with _staged(store) as path:
        if parent is None:
            contents.make_subvolume(path)
            os.chown(path, store.uid, store.gid)
        else:
            contents.snapshot(content or store.layout.content(parent), path)
        contents.limit(path, size, store.xattr_namespace)
    return path


@contextlib.contextmanager
def _staged(store: Store) -> Iterator[str]:
    store.identity.verify()
    path = f"{store.layout.staging}/{os.getpid()}.{next(store.serial)}"
    try:
        yield path
    except BaseException:
        removal.discard_staged(store, path)
        raise


def swap_in(
    store: Store, id: LayerId, staged: str, fingerprint: str = "", *, settled: bool = False
) -> None:
    """Replace the layer's content by staged content, with one rename. The old content is discarded.

    `fingerprint` is recorded with the content, "" for none. `settled`: see dialect.mark_settled.
    The caller has synced the content; this syncs the names. With RENAME_EXCHANGE (renameat2(2))
    both names exist at every moment. Raises OSError; then nothing was done.
    """
    store.identity.verify()
    content = store.layout.content(id)
    require_directory(content, id)
    at = syscalls.AT_FDCWD
    contents.thaw(content)
    records.write(staged, fingerprint, store.xattr_namespace)
    if settled:
        mark_settled(staged, store.xattr_namespace)
    syscalls.renameat2(at, staged, at, content, syscalls.RENAME_EXCHANGE)
    if store.sync != "none":
        try:
            fsync(store.layout.diff)
            if fingerprint:
                fsync(content)
        except OSError:
            syscalls.renameat2(at, staged, at, content, syscalls.RENAME_EXCHANGE)
            raise
    removal.discard_staged(store, staged)
    store.unrecorded.discard(id)
