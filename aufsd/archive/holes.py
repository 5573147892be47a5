"""Turns zeros of a large file into holes. A tar has every byte; a layer need not."""

import errno
import os
from typing import Final

from aufsd.kernel import syscalls

# looked at, and given back, in pieces of this size; smaller files are left alone
PIECE: Final = 64 << 10
_ZEROS: Final = bytes(PIECE)
_FIRST: Final = 64
_PUNCH: Final = syscalls.FALLOC_FL_PUNCH_HOLE | syscalls.FALLOC_FL_KEEP_SIZE


def punch(fd: int, start: int, end: int) -> bool:
    """Free the blocks of zeros between two offsets. False if this file cannot have holes.

    Call it while the pages are still in memory, before they are written to disk. Most pieces are
    recognised as data by a few bytes.
    """
    hole = -1
    at = -(-start // PIECE) * PIECE
    while at < end:
        size = min(PIECE, end - at)
        empty = not any(os.pread(fd, _FIRST, at)) and os.pread(fd, size, at) == _ZEROS[:size]
        if empty and hole < 0:
            hole = at
        elif not empty and hole >= 0:
            if not _free(fd, hole, at):
                return False
            hole = -1
        at += PIECE
    return hole < 0 or _free(fd, hole, end)


def _free(fd: int, start: int, end: int) -> bool:
    try:
        syscalls.fallocate(fd, _PUNCH, start, end - start)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False
    return True
