"""A small file system: a test can fill it to the last name and give room again, or break it."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
def ext4_at(directory: Path) -> Iterator[Path]:
    """An ext4 of its own of 64 MiB, on a loop device; root has no blocks kept for it."""
    image, disk = directory / "image", directory / "disk"
    disk.mkdir()
    with image.open("xb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, disk], check=True)
    try:
        yield disk
    finally:
        syscalls.umount2(str(disk), syscalls.MNT_DETACH)


@contextmanager
def filled(disk: Path) -> Iterator[Callable[[], None]]:
    """Inside, a small file system has no block left; and what fills it again."""
    ballast = disk / "ballast"
    fd = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def fill() -> None:
        for size in (4 << 20, 64 << 10, 4 << 10):
            with suppress(OSError):
                while True:
                    os.posix_fallocate(fd, os.fstat(fd).st_size, size)

    try:
        fill()
        yield fill
    finally:
        os.close(fd)
        ballast.unlink()


@contextmanager
def broken_at_will(directory: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """An ext4 of its own on a loop device, and what breaks it: read-only, for good."""
    with ext4_at(directory) as disk:
        device = os.path.basename(os.path.realpath(f"/sys/dev/block/{_numbers(disk)}"))

        def break_it() -> None:
            # Documentation/ABI/testing/sysfs-fs-ext4
            Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("broken by a test")

        yield disk, break_it


def _numbers(path: Path) -> str:
    device = os.stat(path).st_dev
    return f"{os.major(device)}:{os.minor(device)}"
