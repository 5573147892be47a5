"""One task reads all sockets of a listener, and carries out all calls that need no waiting.

It works in ticks. In one tick it takes a line of each connection that has one, and carries out
these calls without an await. At the end of the tick, what they changed in the table is written to
the journal in one piece; then they are answered. A call that has to wait becomes a task.
"""

import time
from collections.abc import Awaitable, Callable, Sized
from contextlib import AbstractContextManager
from typing import Any, Protocol

import trio

from aufsd.rpc.poller import Poller
from aufsd.rpc.ready import Queued, ReadyQueue
from aufsd.service.log import written_together

# in one tick; then the other tasks of the daemon run
_LINES_PER_TICK = 32
# where the reader has only a share of the event loop's time: seconds, and sockets, of one tick
_SLICE = 0.0005
_SOCKETS_PER_SLICE = 16


class Connection(Queued, Protocol):
    """A connection, as its reader sees it."""

    # Trio's clock; the reader looks once a second
    deadline: float

    def on_ready(self, events: int) -> None:
        """Handle what epoll reports for the socket."""

    def step(self) -> None:
        """Begin the next call, if there is one."""

    def expire(self) -> None:
        """The deadline has passed."""

    def fail(self, error: Exception) -> None:
        """One of the methods above has raised this."""


# how often deadlines are looked at while there are any
_SWEEP = 1.0  # seconds


class Reader:
    """Reads the sockets of its connections while `run` runs.

    `tick` is the context manager around the calls of one tick. When it is left, it writes down what
    they changed. Until then their changes are in `buffered`, which is always the same object.
    `share` is how much of the event loop's time the reader may take: with 0.2, it sleeps four times
    as long as each tick took.
    """

    def __init__(
        self, tick: AbstractContextManager[None], buffered: Sized = (), *, share: float = 1.0
    ) -> None:
        self.poller: Poller[Connection] = Poller()
        self._tick = tick
        self._buffered = buffered
        # seconds to sleep for each second that was used
        self._sleep_factor = 1 / share - 1
        self._ready: ReadyQueue[Connection] = ReadyQueue()
        # answers that wait for the end of the tick
        self._replies: list[tuple[Connection, Callable[[], None]]] = []
        self._tasks: trio.Nursery | None = None
        self._timed: set[Connection] = set()
        self._timing = trio.Event()

    async def run(self) -> None:
        """Read, and run calls, until cancelled; then the calls are cancelled too."""
        async with trio.open_nursery() as self._tasks:
            self._tasks.start_soon(self._expire)
            if self._sleep_factor:
                await self._read_sharing()
            else:
                await self._read()

    def close(self) -> None:
        """Close the epoll instance, after `run` has ended."""
        self.poller.close()

    # --- what connections ask of it -----------------------------------------------------------

    def enqueue(self, connection: Connection) -> None:
        """Have the connection's `step` called in the next tick."""
        self._ready.push(connection)
        self.poller.wake()

    def after_tick(self, connection: Connection, reply: Callable[[], None]) -> None:
        """Call `reply` when the changes so far are in the journal: at once if there are none."""
        if self._replies or self._buffered:
            self._replies.append((connection, reply))
        else:
            reply()

    def start(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run a call that has to wait in a task of its own. `work` handles its own exceptions."""
        assert self._tasks is not None
        self._tasks.start_soon(work, *args)

    def set_deadline(self, connection: Connection, deadline: float) -> None:
        """Have `expire` called about then. Replaces the last deadline; math.inf: none."""
        connection.deadline = deadline
        if deadline < float("inf"):
            self._timed.add(connection)
            self._timing.set()
        else:
            self._timed.discard(connection)

    # --- the loop -----------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            self._run_tick()
            if self._ready:
                # the other tasks run
                await trio.lowlevel.checkpoint()
            else:
                await self.poller.wait()
            self._receive()

    async def _read_sharing(self) -> None:
        """As `_read`, but sleeps after each tick to stay within the share."""
        while True:
            if not self._ready:
                await self.poller.wait()
            # of the processor, or other work on a busy machine would lengthen the sleep many times
            began = time.thread_time()
            end = time.perf_counter() + _SLICE
            self._receive()
            self._run_tick(until=end)
            await trio.sleep((time.thread_time() - began) * self._sleep_factor)

    def _receive(self) -> None:
        for connection, events in self.poller.ready(
            _SOCKETS_PER_SLICE if self._sleep_factor else -1
        ):
            try:
                connection.on_ready(events)
            except Exception as error:
                connection.fail(error)

    def _run_tick(self, until: float = float("inf")) -> None:
        """Begin the calls of one tick, and answer them."""
        # their lines of the log are written in one piece
        with written_together():
            with self._tick:
                for _ in range(_LINES_PER_TICK):
                    if not self._ready or time.perf_counter() > until:
                        break
                    connection = self._ready.pop()
                    _guard(connection, connection.step)
            if self._replies:
                replies, self._replies = self._replies, []
                for connection, reply in replies:
                    _guard(connection, reply)

    async def _expire(self) -> None:
        while True:
            await self._timing.wait()
            self._timing = trio.Event()
            while self._timed:
                earliest = min(connection.deadline for connection in self._timed)
                await trio.sleep_until(min(earliest, trio.current_time() + _SWEEP))
                now = trio.current_time()
                for connection in [each for each in self._timed if each.deadline <= now]:
                    self._timed.discard(connection)
                    _guard(connection, connection.expire)


def _guard(connection: Connection, step: Callable[[], None]) -> None:
    """Run a step. An exception, which is a fault of aufsd, ends this connection only."""
    try:
        step()
    except Exception as error:
        connection.fail(error)
