"""Where the stores lie: an ext4 of their own for each case, in an image on the machine's disk.

ext4 passes over every inode that was freed in the last minutes when it looks for one
(recently_deleted() in fs/ext4/ialloc.c). On a file system where others delete, or the round before
did, creating 5,000 files takes from 0.1 s to 4 s: any figure could be had.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aufsd.kernel import mountinfo, probe, syscalls

SIZE = 40 << 30  # bytes, of which those are taken that are used


def describe(where: str) -> str:
    """On what the cases will stand, in words."""
    if shutil.which("mkfs.ext4") is None:
        return f"{probe.ground(where).kind}, shared with all else (no mkfs.ext4 for one of our own)"
    return f"ext4 in an image, new for each case, on {probe.ground(where).kind}"


@contextmanager
def work(where: str) -> Iterator[Path]:
    """A directory to work in; goes with all that is in it, and mounted there."""
    with tempfile.TemporaryDirectory(prefix="aufsd-bench-", dir=where) as outer:
        inner = Path(outer, "ground")
        inner.mkdir()
        if shutil.which("mkfs.ext4") is not None:
            _mount_image(Path(outer, "image"), inner)
        try:
            yield inner
        finally:
            # containers-storage leaves its store mounted on itself
            for row in reversed(mountinfo.mounted_under(outer)):
                syscalls.umount2(row.mount_point, syscalls.MNT_DETACH)


def _mount_image(image: Path, target: Path) -> None:
    with image.open("wb") as file:
        file.truncate(SIZE)
    # what mkfs leaves to the kernel's background thread is left undone: it would run meanwhile
    command = ["mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(image)]
    subprocess.run(command, check=True)
    command = ["mount", "-o", "loop,noinit_itable", str(image), str(target)]
    subprocess.run(command, check=True)
