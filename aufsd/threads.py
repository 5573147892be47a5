"""The one place where blocking work leaves the event loop.

Work given to a thread is never abandoned. A cancelled caller still waits for the thread and gets
its result, so the caller always knows what was done. The one exception is `Closing`, which has no
result.
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

# eventfds kept for the next calls; each call that waits needs one
EVENTFDS_KEPT = 8
# far longer than a close takes where nobody is asked, and short enough for the event loop
_MOMENT = 0.02  # seconds

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

    They are few, and not those of the disk. A client that is refused again and again, and has the
    holders of a mount looked up each time, delays no other call.
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


class Closing:
    """Threads that close files whose server does not answer: close(2) asks it, and waits for it.

    That is so with FUSE and network file systems, and no signal ends it.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        # those that the host gave no thread for
        self._waiting: list[int] = []

    def close(self, fd: int) -> bool:
        """Close it; False if that still goes on after a moment, in which nobody is served.

        Where the host gives no thread it is closed with the next one, or when this is asked how
        many there are.
        """
        self._waiting.append(fd)
        return self._begin() and not self._threads[-1].is_alive()

    @property
    def going_on(self) -> int:
        """How many files are not closed yet."""
        self._begin()
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        return len(self._threads) + len(self._waiting)

    def _begin(self) -> bool:
        """Begin to close all that wait; False if the host gives no thread now."""
        while self._waiting:
            thread = threading.Thread(target=_close, args=(self._waiting[-1],), daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._waiting.pop()
            self._threads = [each for each in self._threads if each.is_alive()] + [thread]
            thread.join(_MOMENT)
        return True


def _close(fd: int) -> None:
    # what the server says of it is for who wrote to the file
    with suppress(OSError):
        os.close(fd)


class MountThread:
    """The one thread that mounts and unmounts, so that the kernel sees one such call at a time.

    Concurrent aufs mounts raced on the xino file (moby#21545, #39107); concurrent umounts made
    /proc/mounts readers see half a table (moby ae431b10a9).
    """

    def __init__(self) -> None:
        # A thread of our own. trio.to_thread.run_sync costs three times as much, because it names
        # the thread and has a limiter. And a mount by descriptor number gives its thread a working
        # directory of its own (union/runner.py).
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # not in use now
        self._eventfds: list[_Eventfd] = []
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

        Cancellation while it waits for the thread: the function was not called. After that: it runs
        to its end and its result is returned.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._thread is None:
            thread = threading.Thread(target=self._serve, name="mounts", daemon=True)
            # RuntimeError where the host gives no thread: the next call tries again
            thread.start()
            self._thread = thread
        done = self._event()
        asked = time.monotonic()
        # holds one item: the thread takes it and calls the function, or the cancelled task takes it
        unclaimed = [True]
        results: list[outcome.Outcome[T]] = []

        def job() -> None:
            if not _claim(unclaimed):
                return
            began = self._since = time.monotonic()
            results.append(outcome.capture(function, *args, **kwargs))
            self._since = None
            self.calls += 1
            self.wait_seconds += began - asked
            self.busy_seconds += time.monotonic() - began
            done.set()

        self._jobs.put(job)
        try:
            await done.wait()
        except trio.Cancelled:
            if _claim(unclaimed):
                self._keep(done)
                raise
            with trio.CancelScope(shield=True):
                await done.wait()
        self._keep(done)
        return results[0].unwrap()

    def _event(self) -> "_Eventfd | _LoopMessage":
        if self._eventfds:
            return self._eventfds.pop()
        try:
            return _Eventfd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except OSError:
            # no descriptor is left, or no memory: the mounts of a host do not wait for that
            return _LoopMessage(trio.lowlevel.current_trio_token(), trio.Event())

    def _keep(self, done: "_Eventfd | _LoopMessage") -> None:
        if isinstance(done, _Eventfd):
            if len(self._eventfds) < EVENTFDS_KEPT:
                self._eventfds.append(done)
            else:
                os.close(done.fd)

    def close(self) -> None:
        """Let the thread end when it has done what it was given; no call may wait for it."""
        self._jobs.put(None)
        self._thread = None
        while self._eventfds:
            os.close(self._eventfds.pop().fd)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


@dataclass(frozen=True, slots=True)
class _Eventfd:
    """Wakes the waiting task directly.

    Trio's token would first wake a task of Trio's, which wakes ours one tick of the loop later.
    That is a third of the time that a call spends on the way to the thread and back.
    """

    fd: int

    async def wait(self) -> None:
        await trio.lowlevel.wait_readable(self.fd)
        os.eventfd_read(self.fd)

    def set(self) -> None:
        while True:
            try:
                os.eventfd_write(self.fd, 1)
            except OSError:
                # eventfd(2) has none for this; a task that waits for good is worse than a pause
                time.sleep(0.01)
            else:
                return


@dataclass(frozen=True, slots=True)
class _LoopMessage:
    """Wakes the task by a message to the event loop: slower, and needs no descriptor."""

    token: trio.lowlevel.TrioToken
    event: trio.Event

    async def wait(self) -> None:
        await self.event.wait()

    def set(self) -> None:
        # the loop has ended: then nobody waits
        with suppress(trio.RunFinishedError):
            self.token.run_sync_soon(self.event.set)


def _claim(unclaimed: list[bool]) -> bool:
    """Take the one item out; False if it is gone. Atomic, as every method of a list is."""
    try:
        return unclaimed.pop()
    except IndexError:
        return False
