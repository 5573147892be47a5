"""Measures a layer's own content."""

import os
from typing import Final, NamedTuple

from aufsd.archive.compact import Seen
from aufsd.kernel.syscalls import AT_FDCWD
from aufsd.store import whiteouts
from aufsd.store.walk import walk


class Content(NamedTuple):
    """Bytes of the regular files, each inode once, marks not counted; and all entries."""

    bytes: int
    entries: int


class Used(NamedTuple):
    """Allocated bytes and inodes: each once, the top directory and whiteouts among them."""

    size: int
    inodes: int


# in units of 512 bytes (inode(7)), whatever the block size is
UNIT: Final = 512


def measure(*, aufs: bool) -> Content:
    """Measure the layer that the current directory is the root of; it is another one afterwards.

    `aufs`: names that begin with `.wh.` are marks.
    """
    size = count = 0
    linked = Seen()
    for here in walk(AT_FDCWD):
        os.fchdir(here.fd)
        with os.scandir(b".") as found:
            for entry in found:
                name = entry.name
                if aufs and name.startswith(whiteouts.WHITEOUT):
                    count += here.depth > 0 or name not in whiteouts.HOUSEKEEPING
                    continue
                count += 1
                if entry.is_dir(follow_symlinks=False):
                    here.later(name)
                elif entry.is_file(follow_symlinks=False):
                    status = _status(name)
                    if status is not None and is_first(status, linked):
                        size += status.st_size
    return Content(size, count)


def used(*, aufs: bool) -> Used:
    """What the layer that the current directory is the root of takes up of its file system."""
    top = os.stat(".")
    size, inodes = top.st_blocks * UNIT, 1
    linked = Seen()
    for here in walk(AT_FDCWD):
        os.fchdir(here.fd)
        with os.scandir(b".") as found:
            for entry in found:
                name = entry.name
                if aufs and not here.depth and name in whiteouts.HOUSEKEEPING:
                    continue
                directory = entry.is_dir(follow_symlinks=False)
                status = _status(name)
                if status is not None and (directory or is_first(status, linked)):
                    size += status.st_blocks * UNIT
                    inodes += 1
                if directory:
                    here.later(name)
    return Used(size, inodes)


def _status(name: bytes) -> os.stat_result | None:
    """lstat(2); None if the layer is in use, and the name went away."""
    try:
        return os.lstat(name)
    except FileNotFoundError:
        return None


def is_first(status: os.stat_result, linked: Seen) -> bool:
    """Whether this is the first name of its inode; `linked` are those that have several."""
    return status.st_nlink == 1 or linked.add(b"%x.%x" % (status.st_dev, status.st_ino))
