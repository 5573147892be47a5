"""One task reads all sockets of a listener, and carries out all calls that need no waiting.

What had arrived when it looked is taken in one turn, without an await: a line of each connection
after the other. What these calls change in the table is written to the journal at the end of the
turn, in one piece, and then they are answered. A call that has to wait becomes a task.
"""

import time
from collections.abc import Awaitable, Callable, Sized
from contextlib import AbstractContextManager
from typing import Any, Protocol

import trio

from aufsd.rpc.poller import Poller
from aufsd.rpc.ready import Queued, ReadyQueue
from aufsd.service.log import together

# after so many lines everything else in the daemon has a turn
_LINES = 32
# and with a share after so long, in seconds, and so many sockets that were read
_SLICE = 0.0005
_SOCKETS = 16


class Connection(Queued, Protocol):
    """A connection, as its reader sees it."""

    # when it is given up if nothing changes (Trio's clock); the reader looks now and then
    deadline: float

    def on_ready(self, events: int) -> None:
        """Do what the socket is ready for, as the poller says it."""

    def step(self) -> None:
        """Begin what comes next, if anything does."""

    def expire(self) -> None:
        """The deadline has passed."""

    def fail(self, error: Exception) -> None:
        """One of the above has raised this."""


# how often deadlines are looked at while there are any
_SWEEP = 1.0  # seconds


class Reader:
    """Reads for the connections that it knows. `run` is its life.

    `turn` is entered around the calls of one turn, and writes down what they changed when it is
    left; until then that is in `unwritten`, which is always the same object. `share` is how much of
    the event loop's time it may take: below 1, it sleeps after each slice to make up for it.
    """

    def __init__(
        self, turn: AbstractContextManager[None], unwritten: Sized = (), *, share: float = 1.0
    ) -> None:
        self.poller: Poller[Connection] = Poller()
        self._turn = turn
        self._unwritten = unwritten
        # seconds to sleep for each that was used
        self._rest = 1 / share - 1
        self._ready: ReadyQueue[Connection] = ReadyQueue()
        # answers that wait for the end of the turn
        self._replies: list[tuple[Connection, Callable[[], None]]] = []
        self._tasks: trio.Nursery | None = None
        self._timed: set[Connection] = set()
        self._timing = trio.Event()

    async def run(self) -> None:
        """Read, and run calls, until cancelled; then the calls are cancelled too."""
        async with trio.open_nursery() as self._tasks:
            self._tasks.start_soon(self._expire)
            if self._rest:
                await self._read_sharing()
            else:
                await self._read()

    def close(self) -> None:
        """Close what it waits with, when `run` has ended."""
        self.poller.close()

    # --- what connections ask of it -----------------------------------------------------------

    def enqueue(self, connection: Connection) -> None:
        """Have `step` called: there is something to do."""
        self._ready.push(connection)
        self.poller.wake()

    def after_turn(self, connection: Connection, reply: Callable[[], None]) -> None:
        """Call this when what the present turn has changed so far is written down."""
        if self._replies or self._unwritten:
            self._replies.append((connection, reply))
        else:
            reply()

    def start(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run a call that has to wait in a task of its own. It has to handle its exceptions."""
        assert self._tasks is not None
        self._tasks.start_soon(work, *args)

    def set_deadline(self, connection: Connection, deadline: float) -> None:
        """Have `expire` called about then, unless another deadline is set (math.inf: none)."""
        connection.deadline = deadline
        if deadline < float("inf"):
            self._timed.add(connection)
            self._timing.set()
        else:
            self._timed.discard(connection)

    # --- its life -----------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            self._begin()
            if self._ready:
                # everything else has its turn
                await trio.lowlevel.checkpoint()
            else:
                await self.poller.wait()
            self._receive()

    async def _read_sharing(self) -> None:
        """As `_read`, within its share."""
        while True:
            if not self._ready:
                await self.poller.wait()
            began = time.perf_counter()
            self._receive()
            self._begin(until=began + _SLICE)
            await trio.sleep((time.perf_counter() - began) * self._rest)

    def _receive(self) -> None:
        for connection, events in self.poller.ready(_SOCKETS if self._rest else -1):
            try:
                connection.on_ready(events)
            except Exception as error:
                connection.fail(error)

    def _begin(self, until: float = float("inf")) -> None:
        """Begin what is ready, as much as one turn takes, and answer it."""
        # their lines of the log go out in one piece
        with together():
            with self._turn:
                for _ in range(_LINES):
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
    """A fault of ours in one connection's work is that connection's alone."""
    try:
        step()
    except Exception as error:
        connection.fail(error)
