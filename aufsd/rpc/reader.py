"""One task reads all sockets and begins all calls, until a call has to wait."""

from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Protocol

import trio

from aufsd.rpc.calls import Turn
from aufsd.rpc.sockets import Hearing, Sockets
from aufsd.rpc.stepping import first_step
from aufsd.service.log import together


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

    def __init__(self, turn: Turn) -> None:
        self._shared = turn
        self.sockets: Sockets[Speaker] = Sockets()
        # those with lines to begin, each once: they take turns, line by line
        self._queue: deque[Speaker] = deque()
        # answers that wait for the end of the turn
        self._held: deque[tuple[Speaker, Coroutine[Any, Any, None]]] = deque()
        self._waiting = False
        # a task whose call has waited and ended, to read when the next call waits
        self._spare = trio.lowlevel.ParkingLot()

    async def run(self) -> None:
        """Read, and run calls, until cancelled; then the calls are cancelled too."""
        async with trio.open_nursery() as tasks:
            await self._read(tasks)

    def enqueue(self, speaker: Speaker) -> None:
        """Have a connection looked at, which has something to do."""
        if not speaker.queued:
            speaker.queued = True
            self._queue.append(speaker)
        if self._waiting:
            self._waiting = False
            self.sockets.ring()

    def hold(self, speaker: Speaker, answer: Coroutine[Any, Any, None]) -> None:
        """Take an answer that may not go out before the turn ends."""
        self._held.append((speaker, answer))

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
            waits = self._turn()
            if waits is None:
                await self._listen()
                continue
            if not self._spare.unpark():
                tasks.start_soon(self._read, tasks)
            speaker, rest = waits
            try:
                await rest
            except Exception as error:
                speaker.fail(error)
            if self._spare:
                return
            await self._spare.park()

    def _turn(self) -> tuple[Speaker, Awaitable[None]] | None:
        """Begin calls until one waits; that one. None when all are begun, or the turn is over."""
        # their lines of the log go out in one piece
        with together():
            if self._held:
                return self._answer()
            if len(self._queue) == 1:
                # most often it stays the only one, and has nobody to share anything with
                waits = self._begin(1)
                if waits is not None or not self._queue:
                    return waits
            with self._shared:
                waits = self._begin(_TURN)
            # if one waits, the next reader answers the others
            return waits or self._answer()

    def _begin(self, most: int) -> tuple[Speaker, Awaitable[None]] | None:
        for _ in range(most):
            if not self._queue:
                break
            speaker = self._queue.popleft()
            speaker.queued = False
            if (rest := _step(speaker, speaker.begin)) is not None:
                return speaker, rest
        return None

    def _answer(self) -> tuple[Speaker, Awaitable[None]] | None:
        while self._held:
            speaker, answer = self._held.popleft()
            if (rest := _step(speaker, partial(first_step, answer))) is not None:
                return speaker, rest
        return None

    async def _listen(self) -> None:
        """Let everything else have its turn, and queue who has sent something by then."""
        if self._queue:
            await trio.lowlevel.checkpoint()
        else:
            self._waiting = True
            await self.sockets.wait()
            self._waiting = False
        for speaker in self.sockets.heard():
            if speaker.queued:
                continue
            try:
                speaker.hear()
            except Exception as error:
                speaker.fail(error)
            self.enqueue(speaker)


def _step(speaker: Speaker, step: Callable[[], Awaitable[None] | None]) -> Awaitable[None] | None:
    """What is left to be awaited of a step, if anything; a fault in it is the speaker's alone."""
    try:
        return step()
    except Exception as error:
        speaker.fail(error)
        return None
