"""One task reads all sockets and begins all calls, until a call has to wait."""

from collections import deque
from collections.abc import Awaitable
from typing import Protocol

import trio

from aufsd.rpc.sockets import Hearing, Sockets


class Speaker(Hearing, Protocol):
    """A connection, as the reader sees it."""

    # it has its place in the queue
    queued: bool

    def hear(self) -> None:
        """Read once: there is something, or nothing will come any more."""

    def begin(self) -> Awaitable[None] | None:
        """Begin what comes next, if anything does; what is left to be awaited of it, if any is."""

    def fail(self, error: Exception) -> None:
        """One of the above has raised this, or what was awaited."""


# after so many lines everything else in the daemon has a turn
_TURN = 32


class Reader:
    """Reads for the connections that it knows. `run` is its life."""

    def __init__(self) -> None:
        self.sockets: Sockets[Speaker] = Sockets()
        # those with lines to begin, each once: they take turns, line by line
        self._queue: deque[Speaker] = deque()
        self._left = _TURN
        self._waiting = False
        # a task whose call has waited and ended, to read when the next call waits
        self._spare = trio.lowlevel.ParkingLot()

    async def run(self) -> None:
        """Read, and run calls, until cancelled; then the calls are cancelled too."""
        async with trio.open_nursery() as tasks:
            await self._read(tasks)

    def enqueue(self, connection: Speaker) -> None:
        """Have a connection looked at, which has something to do."""
        if not connection.queued:
            connection.queued = True
            self._queue.append(connection)
        if self._waiting:
            self._waiting = False
            self.sockets.ring()

    def close(self) -> None:
        """Let go of what it listens with, when `run` has ended."""
        self.sockets.close()

    async def _read(self, tasks: trio.Nursery) -> None:
        """Be the reader, of which there is one at any time.

        A call that never waits is answered before the next line is looked at, and costs no task;
        one that does wait keeps this task, and another reads on, which is the one of an earlier
        such call: a new one costs as much as a short call.
        """
        while True:
            connection = await self._next()
            try:
                rest = connection.begin()
            except Exception as error:
                connection.fail(error)
                continue
            if rest is None:
                continue
            if not self._spare.unpark():
                tasks.start_soon(self._read, tasks)
            try:
                await rest
            except Exception as error:
                connection.fail(error)
            if self._spare:
                return
            await self._spare.park()

    async def _next(self) -> Speaker:
        """The next connection whose turn it is."""
        while not self._queue or not self._left:
            if self._queue:
                await trio.lowlevel.checkpoint()
            else:
                self._waiting = True
                await self.sockets.wait()
                self._waiting = False
            self._left = _TURN
            for connection in self.sockets.heard():
                if connection.queued:
                    continue
                try:
                    connection.hear()
                except Exception as error:
                    connection.fail(error)
                self.enqueue(connection)
        self._left -= 1
        connection = self._queue.popleft()
        connection.queued = False
        return connection
