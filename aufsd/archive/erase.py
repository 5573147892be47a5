"""A directory with all that is in it removed, in staging: nobody else moves what lies there."""

import os
from collections.abc import Iterator

from aufsd.kernel.beneath import DIRECTORY
from aufsd.store.walk import Descent


def erase(name: bytes) -> Iterator[int]:
    """Remove the directory `name` in the current one: the inodes of the directories that went."""
    top = os.open(name, DIRECTORY)
    try:
        with Descent(top) as here:
            _empty(here)
            while True:
                below = here.take()
                if below is not None:
                    here.down(below)
                    _empty(here)
                    continue
                yield os.fstat(here.fd).st_ino
                if not here.depth:
                    break
                gone = here.name
                here.up()
                os.rmdir(gone, dir_fd=here.fd)
    finally:
        os.close(top)
    os.rmdir(name)


def _empty(here: Descent) -> None:
    """Remove what is no directory; those come later."""
    with os.scandir(here.fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                here.later(entry.name)
            else:
                os.unlink(entry.name, dir_fd=here.fd)
