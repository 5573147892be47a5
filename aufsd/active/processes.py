"""Waiting for processes that are not our children."""

import os

import trio

from aufsd.kernel.peer import process

_EXHAUSTED_PAUSE = 1.0  # seconds


async def ended(pid: int, start: int) -> None:
    """Return once the process of this pid and start time has ended, at once if it has.

    pidfd_open(2): a pid may go to another process, a descriptor stays with the one that it was
    opened for, and is readable when that has ended. Cancelled: nothing is left open.
    """
    while True:
        try:
            fd = _opened(pid, start)
        except OSError:
            # out of descriptors or memory, which passes, and says nothing of the process
            await trio.sleep(_EXHAUSTED_PAUSE)
        else:
            break
    if fd is None:
        return
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)


def _opened(pid: int, start: int) -> int | None:
    """A pidfd of the process; None if it has ended. OSError if that cannot be told now."""
    # a process that we cannot see has start time 0
    if not start or process(pid)[1] != start:
        return None
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        # the pid may have gone to another process before the descriptor was there
        same = process(pid)[1] == start
    except OSError:
        os.close(fd)
        raise
    if not same:
        os.close(fd)
        return None
    return fd
