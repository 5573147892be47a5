"""All that is measured, yardsticks and ours alike, comes before what else the machine does."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NICE = -15
# where the scheduler weighs whole sessions against each other (sched(7), the autogroup feature),
# a nice value counts within the session only
_SESSION = Path("/proc/self/autogroup")


@contextmanager
def raised() -> Iterator[None]:
    """A high priority for this process, its session, and those that it starts in the block."""
    before = _session_nice()
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    if before is not None:
        _SESSION.write_text(str(_NICE))
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
        if before is not None:
            with suppress(OSError):
                _SESSION.write_text(str(before))


def _session_nice() -> int | None:
    """`/autogroup-72 nice 0`"""
    try:
        return int(_SESSION.read_text().split()[-1])
    except (OSError, ValueError, IndexError):
        return None
