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
    fd = -1
    while fd < 0:
        # a process that we cannot see has start time 0
        if not start or process(pid)[1] != start:
            return
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        except OSError:
            # out of descriptors or memory, which passes
            await trio.sleep(_EXHAUSTED_PAUSE)
    try:
        # the pid may have gone to another process before the descriptor was there
        if process(pid)[1] == start:
            await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
