"""Pipes with room: fewer switches between the two ends of a stream."""

import contextlib
import fcntl


def enlarge(fd: int, size: int) -> None:
    """Give the pipe `fd` room for `size` bytes if it may have that; no other file minds."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
