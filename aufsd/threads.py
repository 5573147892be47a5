"""The one place where blocking work leaves the event loop.

Work given to a thread is never abandoned: a cancelled caller still waits for the thread, and gets
its result, so that what was done is always known to who asked for it.
"""

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import trio

P = ParamSpec("P")
T = TypeVar("T")


async def run(
    function: Callable[P, T], limiter: trio.CapacityLimiter, *args: P.args, **kwargs: P.kwargs
) -> T:
    """Call `function` in a thread, at most as many at a time as `limiter` has tokens.

    Cancellation while waiting for a token: the function was not called. After that: it runs to its
    end and its result is returned; the cancellation is delivered at the caller's next checkpoint.
    """
    return await trio.to_thread.run_sync(lambda: function(*args, **kwargs), limiter=limiter)


class Disk:
    """Threads for the store's own system calls: mkdir, fsync, rename, deletion."""

    def __init__(self, threads: int = 8) -> None:
        self._limiter = trio.CapacityLimiter(threads)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """See `run` above."""
        return await run(function, self._limiter, *args, **kwargs)


class MountThread:
    """The one thread that mounts and unmounts, so that the kernel sees one such call at a time.

    Concurrent aufs mounts raced on the xino file (moby#21545, #39107); concurrent umounts made
    /proc/mounts readers see half a table (moby ae431b10a9).
    """

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(1)
        # for metrics: calls that ended, and the seconds that they waited and took
        self.calls = 0
        self.wait_seconds = 0.0
        self.busy_seconds = 0.0
        self._since: float | None = None

    @property
    def running_seconds(self) -> float:
        """How long the present call has been running; 0 if there is none."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def queued(self) -> int:
        """How many calls wait for the thread."""
        return self._limiter.statistics().tasks_waiting

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """See `run` above."""
        asked = time.monotonic()

        def timed() -> T:
            began = self._since = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                self._since = None
                self.calls += 1
                self.wait_seconds += began - asked
                self.busy_seconds += time.monotonic() - began

        return await run(timed, self._limiter)
