"""Paths of sockets, however long. Standard library only."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

# sun_path of unix(7) holds 108 bytes, a zero among them
_SUN_PATH = 107


@contextmanager
def reachable(path: str) -> Iterator[str]:
    """A name for `path` that fits into sun_path, good inside the block. Raises OSError."""
    if len(os.fsencode(path)) <= _SUN_PATH:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
