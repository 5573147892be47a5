"""How long a job waits for whoever is at the other end of its stream.

A peer that keeps its connection and never reads, or never writes, would hold a job's place for
ever. What counts is that nothing moves: a slow peer is served, and so is a slow disk.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from aufsd.archive.meter import Meter
from aufsd_client.errors import StreamBroken

# looks within the time that a peer has
_LOOKS = 4


@contextmanager
def limited(meter: Meter, seconds: float) -> Iterator[None]:
    """Raise StreamBroken, ETIMEDOUT, when no byte has moved for so long, or a quarter longer; 0:
    never.

    A blocking write cannot be given a deadline, and the descriptor's flags are its owner's too. So
    a signal looks in now and then: it interrupts what waits (signal(7)), which Python then calls
    again unless the handler raises (PEP 475). For a process of its own, whose main thread this is.
    """
    seen, unmoved = -1, 0

    def look(*_: object) -> None:
        nonlocal seen, unmoved
        if not meter.waiting or meter.bytes != seen:
            seen, unmoved = meter.bytes, 0
            return
        unmoved += 1
        if unmoved == _LOOKS:
            raise StreamBroken(
                f"the other end of the stream has moved no byte for {seconds:g} s",
                errno="ETIMEDOUT",
            )

    if not seconds:
        yield
        return
    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, seconds / _LOOKS, seconds / _LOOKS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
