"""Directories for a trial mount, gone when the trial is over."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from aufsd.store.erase import erase_at


@contextmanager
def scratch_dirs(parent: str, *names: str) -> Iterator[str]:
    """A new directory in `parent`, with these in it; the caller unmounts what it mounts there."""
    os.makedirs(parent, 0o700, exist_ok=True)
    at = tempfile.mkdtemp(dir=parent)
    try:
        for name in names:
            os.makedirs(f"{at}/{name}")
        yield at
    finally:
        left = erase_at(at)
        if left is not None:
            raise left.error()
