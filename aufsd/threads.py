"""The one place where blocking work leaves the event loop.

Work given to a thread is never abandoned: a cancelled caller still waits for the thread, and gets
its result, so that what was done is always known to who asked for it.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

import outcome
import trio

# eventfds that are kept for the next calls; a crowd of calls needs one each
BELLS_KEPT = 8

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


class Scans:
    """Threads that read /proc: of every process, or the mount table of another namespace.

    Apart from those of the disk, and few: whoever is refused again and again, and has those who
    hold a mount looked for each time, keeps no other call waiting.
    """

    def __init__(self, threads: int = 1) -> None:
        self._limiter = trio.CapacityLimiter(threads)

    @property
    def waiting(self) -> int:
        """How many calls wait for a thread."""
        return self._limiter.statistics().tasks_waiting

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """See `run` above."""
        return await run(function, self._limiter, *args, **kwargs)


class MountThread:
    """The one thread that mounts and unmounts, so that the kernel sees one such call at a time.

    Concurrent aufs mounts raced on the xino file (moby#21545, #39107); concurrent umounts made
    /proc/mounts readers see half a table (moby ae431b10a9).
    """

    def __init__(self) -> None:
        # a thread of our own: to_thread.run_sync takes any that is idle and names it, which with
        # its limiter costs three times what the hop does; a call by descriptor number leaves its
        # thread with a working directory of its own besides (union/runner.py)
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # eventfds that no call waits for now
        self._bells: list[_Eventfd] = []
        self._thread: threading.Thread | None = None
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
        return self._jobs.qsize()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in the thread, after all that was given to it before.

        Cancellation while it waits for its turn: the function was not called. After that: it runs
        to its end and its result is returned.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._thread is None:
            thread = threading.Thread(target=self._serve, name="mounts", daemon=True)
            # RuntimeError where the host gives no thread: the next call tries again
            thread.start()
            self._thread = thread
        bell = self._bell()
        asked = time.monotonic()
        # who takes it out has decided: the thread calls the function, or the task is cancelled
        turn = [True]
        results: list[outcome.Outcome[T]] = []

        def job() -> None:
            if not _taken(turn):
                return
            began = self._since = time.monotonic()
            results.append(outcome.capture(function, *args, **kwargs))
            self._since = None
            self.calls += 1
            self.wait_seconds += began - asked
            self.busy_seconds += time.monotonic() - began
            bell.ring()

        self._jobs.put(job)
        try:
            await bell.wait()
        except trio.Cancelled:
            if _taken(turn):
                self._keep(bell)
                raise
            with trio.CancelScope(shield=True):
                await bell.wait()
        self._keep(bell)
        return results[0].unwrap()

    def _bell(self) -> "_Eventfd | _Message":
        if self._bells:
            return self._bells.pop()
        try:
            return _Eventfd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except OSError:
            # no descriptor is left, or no memory: the mounts of a host do not wait for that
            return _Message(trio.lowlevel.current_trio_token(), trio.Event())

    def _keep(self, bell: "_Eventfd | _Message") -> None:
        if isinstance(bell, _Eventfd):
            if len(self._bells) < BELLS_KEPT:
                self._bells.append(bell)
            else:
                os.close(bell.fd)

    def close(self) -> None:
        """Let the thread end when it has done what it was given; no call may wait for it."""
        self._jobs.put(None)
        self._thread = None
        while self._bells:
            os.close(self._bells.pop().fd)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


@dataclass(frozen=True, slots=True)
class _Eventfd:
    """Wakes the very task that waits.

    By the token of Trio a task of its own would be woken first, and the loop go round once more
    for ours, which is a third of the hop.
    """

    fd: int

    async def wait(self) -> None:
        await trio.lowlevel.wait_readable(self.fd)
        os.eventfd_read(self.fd)

    def ring(self) -> None:
        while True:
            try:
                os.eventfd_write(self.fd, 1)
            except OSError:
                # eventfd(2) has none for this; a task that waits for good is worse than a pause
                time.sleep(0.01)
            else:
                return


@dataclass(frozen=True, slots=True)
class _Message:
    """The slower way, which needs no descriptor."""

    token: trio.lowlevel.TrioToken
    event: trio.Event

    async def wait(self) -> None:
        await self.event.wait()

    def ring(self) -> None:
        # the loop has ended: then nobody waits
        with suppress(trio.RunFinishedError):
            self.token.run_sync_soon(self.event.set)


def _taken(turn: list[bool]) -> bool:
    """Take the one item out; False if it is gone. Atomic, as every method of a list is."""
    try:
        return turn.pop()
    except IndexError:
        return False
