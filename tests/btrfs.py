"""A file system of type btrfs for tests, in a file."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aufsd.kernel import syscalls

# sparse: a test run writes a few megabytes of it
_SIZE = 2 << 30


@contextmanager
def btrfs_at(directory: Path) -> Iterator[Path]:
    """A new btrfs below an empty directory, mounted; unmounted in the end."""
    image, target = directory / "image", directory / "btrfs"
    with image.open("wb") as file:
        file.truncate(_SIZE)
    target.mkdir()
    subprocess.run(["mkfs.btrfs", "--quiet", str(image)], check=True, capture_output=True)
    # the loop device goes with the mount (LO_FLAGS_AUTOCLEAR)
    subprocess.run(["mount", "-o", "loop,nobarrier", str(image), str(target)], check=True)
    try:
        yield target
    finally:
        syscalls.umount2(str(target), syscalls.MNT_DETACH)
        image.unlink()
