"""A small file system, which a test can fill to the last name and give room again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aufsd.kernel import syscalls

_NAMES = 20_000


@contextmanager
def small(path: Path) -> Iterator[Path]:
    """A tmpfs mounted at `path`, which is made."""
    path.mkdir()
    syscalls.mount("none", str(path), "tmpfs", 0, f"size=256m,mode=755,nr_inodes={_NAMES}")
    try:
        yield path
    finally:
        syscalls.umount2(str(path), syscalls.MNT_DETACH)


@contextmanager
def full(path: str | Path, *, but: int = 0) -> Iterator[None]:
    """Inside, the small file system that `path` lies on takes only so many more names: ENOSPC.

    tmpfs counts every hard link as an inode (shmem_link() in mm/shmem.c), and its limit may be set
    to what is in use.
    """
    top = os.path.realpath(path)
    while os.stat(os.path.dirname(top)).st_dev == os.stat(top).st_dev:
        top = os.path.dirname(top)
    found = os.statvfs(top)
    _allow(top, found.f_files - found.f_ffree + but)
    try:
        yield
    finally:
        _allow(top, _NAMES)


def _allow(top: str, names: int) -> None:
    syscalls.mount("none", top, "", syscalls.MS_REMOUNT, f"nr_inodes={names}")
