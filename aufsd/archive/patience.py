"""Ends a job whose peer moves no byte of its stream for too long.

A peer that never reads or writes would otherwise take the place of a job for ever. A slow peer that
moves bytes is served, and so is a slow disk.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from aufsd.archive.meter import Meter
from aufsd_client.errors import StreamBroken

# looks within the time that a peer has: a write that is cut short by one has moved what it has
# moved, so a peer may have this part of the time more
_LOOKS: Final = 20
# for a write that was cut short by the look that was the last, to say so
_AGAIN: Final = 0.001  # seconds


@contextmanager
def limited(
    meter: Meter, seconds: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """Raise StreamBroken, ETIMEDOUT, when the job has waited so long and no byte moved; 0: never.

    A blocking write cannot be given a deadline, and the descriptor's flags are its owner's too. So
    a signal looks in now and then, and when the time is over: it interrupts what waits (signal(7)),
    which Python then calls again unless the handler raises (PEP 475). For a process of its own,
    whose main thread this is.
    """
    late: float | None = None

    def look(*_: object) -> None:
        nonlocal late
        since = meter.waiting_since
        left = seconds if since is None else since + seconds - clock()
        if left > 0:
            late = None
        elif late == since:
            raise timed_out(seconds)
        else:
            late, left = since, _AGAIN
        signal.setitimer(signal.ITIMER_REAL, min(left, seconds / _LOOKS))

    if not seconds:
        yield
        return
    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, seconds / _LOOKS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def timed_out(seconds: float) -> StreamBroken:
    """The error of a stream that stood still for so long."""
    return StreamBroken(
        f"the other end of the stream has moved no byte for {seconds:g} s", errno="ETIMEDOUT"
    )
