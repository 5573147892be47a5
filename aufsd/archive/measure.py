"""How large a layer's own content is."""

import os
from collections.abc import Callable
from typing import Final, NamedTuple

from aufsd.store import dialect as marks

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Content(NamedTuple):
    """Bytes of the regular files, each inode once, marks not counted; and all entries."""

    bytes: int
    entries: int


def measure(*, aufs: bool) -> Content:
    """Measure the layer that the current directory is the root of; it is another one afterwards.

    `aufs`: names that begin with `.wh.` are marks.
    """
    measured = _Measured(aufs=aufs)
    _walk(os.open(b".", _DIRECTORY), measured.scan)
    return Content(measured.bytes, measured.entries)


def _walk(top: int, scan: Callable[..., list[bytes]]) -> None:
    """Have every directory below `top` scanned, and that itself, which is closed."""
    levels = [(top, scan(top, top=True))]
    while levels:
        fd, names = levels[-1]
        if not names:
            os.close(fd)
            levels.pop()
            continue
        try:
            below = os.open(names.pop(), _DIRECTORY, dir_fd=fd)
        except (FileNotFoundError, NotADirectoryError):
            # the layer is in use, and something in it went away
            continue
        levels.append((below, scan(below)))


class Used(NamedTuple):
    """Allocated bytes and inodes: each once, the top directory and whiteouts among them."""

    size: int
    inodes: int


def used(*, aufs: bool) -> Used:
    """What the layer that the current directory is the root of takes up of its file system."""
    counted = _Counted(aufs=aufs)
    top = os.open(b".", _DIRECTORY)
    counted.count(os.fstat(top))
    _walk(top, counted.scan)
    return Used(counted.size, len(counted.seen))


class _Counted:
    def __init__(self, *, aufs: bool) -> None:
        self.size = 0
        self.seen: set[tuple[int, int]] = set()
        self._aufs = aufs

    def count(self, status: os.stat_result) -> None:
        inode = status.st_dev, status.st_ino
        if inode not in self.seen:
            self.seen.add(inode)
            # in units of 512 bytes (inode(7)), whatever the block size is
            self.size += status.st_blocks * 512

    def scan(self, fd: int, *, top: bool = False) -> list[bytes]:
        """Count what the directory holds; the names of the directories in it."""
        directories = []
        with os.scandir(fd) as found:
            for entry in found:
                name = os.fsencode(entry.name)
                if self._aufs and top and name in marks.HOUSEKEEPING:
                    continue
                try:
                    self.count(os.lstat(name, dir_fd=fd))
                except FileNotFoundError:
                    # the layer is in use, and it went away
                    continue
                if entry.is_dir(follow_symlinks=False):
                    directories.append(name)
        return directories


class _Measured:
    def __init__(self, *, aufs: bool) -> None:
        self.bytes = 0
        self.entries = 0
        self._aufs = aufs
        self._seen: set[int] = set()

    def scan(self, fd: int, *, top: bool = False) -> list[bytes]:
        """Count what the directory holds; the names of the directories in it."""
        os.fchdir(fd)
        directories = []
        with os.scandir(b".") as found:
            for entry in found:
                name = entry.name
                if self._aufs and name.startswith(marks.WHITEOUT):
                    self.entries += not top or name not in marks.HOUSEKEEPING
                    continue
                self.entries += 1
                if entry.is_dir(follow_symlinks=False):
                    directories.append(name)
                elif entry.is_file(follow_symlinks=False):
                    self._file(name)
        return directories

    def _file(self, name: bytes) -> None:
        try:
            status = os.lstat(name)
        except FileNotFoundError:
            return
        if status.st_nlink > 1:
            if status.st_ino in self._seen:
                return
            self._seen.add(status.st_ino)
        self.bytes += status.st_size
