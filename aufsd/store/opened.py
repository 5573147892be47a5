"""Opens a layer's content directory beneath the store's root, and reads the marks on it.

Whoever prepared a store may have put a symlink, a file or a mount in the directory's place. Then
the marks would be those of another directory. So the directory is opened once, and its marks are
read and written by descriptor.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from aufsd.kernel.beneath import open_beneath
from aufsd.store import dialect as marks
from aufsd.store.dialect import Dialect, UnknownMark
from aufsd.store.identity import Identity, require_directory
from aufsd.store.ids import LayerId
from aufsd_client.errors import LayerDamaged

_NO_DIRECTORY: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV)


@contextmanager
def content_of(identity: Identity, id: LayerId) -> Iterator[int]:
    """A descriptor of the layer's content directory. Raises LayerDamaged without one, OSError."""
    try:
        fd = open_beneath(identity.root_fd, f"diff/{id}")
    except OSError as error:
        if error.errno not in _NO_DIRECTORY:
            raise
        require_directory(identity.layout.content(id), id)
        raise damaged(id, "something is mounted at its content directory") from error
    try:
        yield fd
    finally:
        os.close(fd)


def dialect_of(identity: Identity, id: LayerId, namespace: str) -> Dialect:
    """The dialect of a layer's whiteouts. Raises LayerDamaged, OSError."""
    with content_of(identity, id) as fd:
        try:
            # who reads the content asks for both
            marks.interrupted(fd, namespace)
            return marks.read_dialect(fd, namespace)
        except UnknownMark as error:
            raise damaged(id, error.strerror) from error


def converting_to(identity: Identity, id: LayerId, namespace: str) -> Dialect | None:
    """The target of an interrupted conversion of the layer; None if there is none.

    Raises LayerDamaged, OSError.
    """
    with content_of(identity, id) as fd:
        try:
            return marks.interrupted(fd, namespace)
        except UnknownMark as error:
            raise damaged(id, error.strerror) from error


def damaged(id: LayerId, problem: str) -> LayerDamaged:
    """The error of a damaged layer."""
    return LayerDamaged(f"layer {id} is damaged: {problem}", id=id, problem=problem)


def own_directory(path: str) -> None:
    """Have a directory at `path`, in one that is ours alone. Raises OSError.

    A symlink there would have a file system delete what lies elsewhere: it is removed.
    """
    try:
        os.makedirs(path, 0o700)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            os.mkdir(path, 0o700)
