"""How large a layer's own content is."""

import os
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
    top = os.open(b".", _DIRECTORY)
    levels = [(top, measured.scan(top, top=True))]
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
        levels.append((below, measured.scan(below)))
    return Content(measured.bytes, measured.entries)


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
