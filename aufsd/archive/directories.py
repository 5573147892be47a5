"""The directories of the layer that is being written, and how to get from one to another.

Directories are kept as a tree of names. No path is kept, so a path may be longer than a system call
takes. The layer is the root of the process, and nobody else moves anything in it.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from aufsd.kernel.beneath import DIRECTORY
from aufsd.store.walk import Descent, Way, between

# PATH_MAX is 4096 with the NUL
PATH_MAX: Final = 4000


class Directory:
    """A directory that entries were made in: it gets `mtime` when nothing is written any more.

    `way` leads to it through no symlink. `below` are the known ones in it, by the names that lead
    there: one of them may be a symlink's. New entries of a `setgid` one belong to its group until
    they are told otherwise. A default ACL would be given to new entries too, so it waits till the
    end.
    """

    __slots__ = ("above", "below", "default_acl", "inode", "mtime", "setgid", "way")

    def __init__(self, above: "Directory | None", way: Way, found: os.stat_result) -> None:
        self.above = above
        self.way = way
        self.below: dict[bytes, Directory] = {}
        self.mtime = found.st_mtime_ns
        self.inode = found.st_ino
        self.setgid = bool(found.st_mode & stat.S_ISGID)
        self.default_acl = b""

    def above_it(self) -> list["Directory"]:
        """The directories on the way to it, the root first, itself last."""
        found = [self]
        while (above := found[-1].above) is not None:
            found.append(above)
        found.reverse()
        return found

    def known(self) -> Iterator["Directory"]:
        """Itself and all that are known in it, each after the one that it lies in."""
        pending = [self]
        while pending:
            here = pending.pop()
            yield here
            pending += [below for below in here.below.values() if below.above is here]


class Marks:
    """aufs's marks: each is a link of the layer's first one, as aufs and Docker make them."""

    def __init__(self) -> None:
        self._first: bytes | None = None

    def make(self, here: Directory, path: bytes) -> bool:
        """Make one at a path from the current directory, which is `here`; False if it is there."""
        try:
            if self._first is not None:
                os.link(self._first, path)
                return True
        except FileExistsError:
            return False
        except OSError as error:
            # the first one is gone, or has all the links that one may have
            if error.errno not in (errno.ENOENT, errno.EMLINK, errno.ENAMETOOLONG):
                raise
        try:
            os.mknod(path, stat.S_IFREG | 0o444)
        except FileExistsError:
            return False
        if here.setgid:
            os.chown(path, 0, 0)
        os.utime(path, ns=(0, 0))
        self._first = None
        if here.way.size + len(path) < PATH_MAX - 2:
            at = here.way.path()
            self._first = b"/%b/%b" % (at, path) if at else b"/" + path
        return True


def step(start: Directory, target: Directory, *, known: bool) -> None:
    """chdir(2) from one directory to another, however deep they lie; `known`: we are at `start`."""
    if target.way.size < PATH_MAX:
        os.chdir(b"/" + target.way.path())
        return
    if not known:
        os.chdir(b"/")
    ups, downs = between(start.way, target.way)
    while ups:
        step = min(ups, PATH_MAX // 3)
        os.chdir(b"../" * step)
        ups -= step
    piece: list[bytes] = []
    size = 0
    for name in downs:
        if size + len(name) >= PATH_MAX:
            os.chdir(b"/".join(piece))
            piece, size = [], 0
        piece.append(name)
        size += len(name) + 1
    if piece:
        os.chdir(b"/".join(piece))


def change_directory(path: bytes) -> None:
    """chdir(2) to a path from the root, however long it is."""
    if len(path) < PATH_MAX:
        os.chdir(b"/" + path)
        return
    os.chdir(b"/")
    while path:
        cut = len(path) if len(path) < PATH_MAX else path.rindex(b"/", 0, PATH_MAX)
        os.chdir(path[:cut])
        path = path[cut + 1 :]


@contextmanager
def directory_of(path: bytes) -> Iterator[tuple[int | None, bytes]]:
    """A descriptor and a name by which system calls reach `path` from the root."""
    if len(path) < PATH_MAX:
        yield None, b"/" + path
        return
    directory, _, name = path.rpartition(b"/")
    here = os.open(b".", DIRECTORY)
    try:
        change_directory(directory)
        there = os.open(b".", DIRECTORY)
        os.fchdir(here)
    finally:
        os.close(here)
    try:
        yield there, name
    finally:
        os.close(there)


# --- removing one -----------------------------------------------------------------------------


def erase(name: bytes) -> Iterator[int]:
    """Remove the directory `name` in the current one: the inodes of the directories that went."""
    top = os.open(name, DIRECTORY)
    try:
        with Descent(top) as here:
            _empty(here)
            while True:
                below = here.take()
                if below is not None:
                    here.down(below)
                    _empty(here)
                    continue
                yield os.fstat(here.fd).st_ino
                if not here.depth:
                    break
                gone = here.name
                here.up()
                os.rmdir(gone, dir_fd=here.fd)
    finally:
        os.close(top)
    os.rmdir(name)


def _empty(here: Descent) -> None:
    """Remove what is no directory; those come later."""
    with os.scandir(here.fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                here.later(entry.name)
            else:
                os.unlink(entry.name, dir_fd=here.fd)
