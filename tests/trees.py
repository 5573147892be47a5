"""Trees as deep and as wide as users make them, made without a path."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aufsd.kernel import syscalls

DEEP = 10_000


def deepen(top: Path, levels: int = DEEP, name: str = "d") -> int:
    """Nested directories below `top`; a descriptor of the innermost, which the caller closes."""
    here = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    return here


@contextmanager
def in_memory(at: Path) -> Iterator[Path]:
    """A tmpfs at a new directory: deep trees take a disk half a minute, and go with it at once."""
    at.mkdir()
    syscalls.mount("tmpfs", str(at), "tmpfs", 0, "")
    try:
        yield at
    finally:
        syscalls.umount2(str(at), syscalls.MNT_DETACH)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
