"""A small file system: a test can fill it to the last name and give room again, or break it."""

import os
import subprocess
from collections.abc import Callable, Iterator
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


@contextmanager
def broken_at_will(directory: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """An ext4 of its own on a loop device, and what breaks it: read-only, for good."""
    image, disk = directory / "image", directory / "disk"
    disk.mkdir()
    with image.open("xb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, disk], check=True)
    device = os.path.basename(os.path.realpath(f"/sys/dev/block/{_numbers(disk)}"))

    def break_it() -> None:
        # Documentation/ABI/testing/sysfs-fs-ext4
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("broken by a test")

    try:
        yield disk, break_it
    finally:
        syscalls.umount2(str(disk), syscalls.MNT_DETACH)


def _numbers(path: Path) -> str:
    device = os.stat(path).st_dev
    return f"{os.major(device)}:{os.minor(device)}"
