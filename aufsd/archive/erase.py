"""A directory with all that is in it removed, in staging: nobody else moves what lies there."""

import os
from collections.abc import Iterator
from typing import Final

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def erase(name: bytes) -> Iterator[int]:
    """Remove the directory `name` in the current one: the inodes of the directories that went.

    One descriptor, whatever the depth: the way up is `..`.
    """
    way = [name]
    here = os.open(name, _DIRECTORY)
    try:
        while way:
            below = _emptied(here)
            if below is not None:
                inner = os.open(below, _DIRECTORY, dir_fd=here)
                way.append(below)
                os.close(here)
                here = inner
                continue
            inode = os.fstat(here).st_ino
            above = os.open("..", _DIRECTORY, dir_fd=here)
            os.close(here)
            here = above
            os.rmdir(way.pop(), dir_fd=here)
            yield inode
    finally:
        os.close(here)


def _emptied(fd: int) -> bytes | None:
    """Remove what a directory holds up to the first directory in it, whose name this is."""
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return os.fsencode(entry.name)
            os.unlink(entry.name, dir_fd=fd)
    return None
