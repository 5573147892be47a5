"""Mounts for a test, in this run's own mount namespace."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from aufsd.kernel import syscalls


@contextmanager
def mounted(source: str, at: str, fstype: str, flags: int = 0, data: str = "") -> Iterator[None]:
    """Mount something on a directory, which is made if it is not there; unmount it at the end."""
    os.makedirs(at, exist_ok=True)
    syscalls.mount(source, at, fstype, flags, data)
    try:
        yield
    finally:
        syscalls.umount2(at, syscalls.MNT_DETACH)
