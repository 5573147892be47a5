"""Background work: a failure is reported and tried again, and never ends the daemon.

A task does its work in pieces. A piece that raises is tried again after a pause. The log has a line
when the failures begin and one when they are over; `health` reports them meanwhile.
"""

import errno
from collections.abc import Awaitable, Callable, Hashable, Iterator
from dataclasses import dataclass, field

import structlog
import trio

from aufsd import results
from aufsd_client.errors import AufsdError

log = structlog.get_logger(__name__)

# the pause after the first failure; it doubles each time, up to LATEST
SOONEST, LATEST = 0.25, 60.0  # seconds
# failures in the line of `health`
_NAMED = 5

Piece = Callable[[], Awaitable[object]]


@dataclass(slots=True)
class AutoResetEvent:
    """An event for one waiting task, which is unset again when the task has been woken."""

    _event: trio.Event = field(default_factory=trio.Event)

    def set(self) -> None:
        """Wake the task, now or when it waits next."""
        self._event.set()

    async def wait(self) -> None:
        """Wait until the event is set, and unset it."""
        await self._event.wait()
        self._event = trio.Event()


@dataclass(slots=True)
class Task:
    """One background task. `name` is its check in `health`, `fine` the text when all is well.

    `failing` has a sentence for each piece that fails at present, by the piece's key.
    """

    name: str
    fine: str
    failing: dict[Hashable, str] = field(default_factory=dict)

    async def repeat(
        self, piece: Piece, *, wake: Piece | None = None, latest: float = LATEST
    ) -> None:
        """Do a piece of work each time that `wake` returns. Endless.

        `wake` None: the piece itself waits for something to do. The pause after a failure grows to
        `latest` seconds, and ends early when `wake` returns.
        """
        while True:
            if wake is not None:
                await wake()
            await self.until_done(piece, wake=wake, latest=latest)

    async def until_done(
        self,
        piece: Piece,
        key: Hashable = None,
        *,
        wake: Piece | None = None,
        latest: float = LATEST,
    ) -> None:
        """Do a piece of work, and try it again until it raises nothing."""
        pause = min(SOONEST, latest)
        while not await self.tried(piece, key):
            with trio.move_on_after(pause):
                await (trio.sleep_forever if wake is None else wake)()
            pause = min(2 * pause, latest)

    async def tried(self, piece: Piece, key: Hashable = None) -> bool:
        """Do a piece of work; whether it could be done. Raises nothing but its cancellation."""
        failed = False
        try:
            await piece()
        # out of a nursery an error comes in a group, and may come with the cancellation
        except* Exception as group:
            failed = True
            self.failed(key, *leaves(group))
        if not failed:
            self.done(key)
        return not failed

    def failed(self, key: Hashable, *errors: Exception) -> None:
        """Note that a piece has failed."""
        said = _several([sentence(error) for error in errors])
        if self.failing.get(key) == said:
            return
        self.failing[key] = said
        # these two say all there is; anything else is a fault of aufsd and needs its traceback
        unexpected = [error for error in errors if not isinstance(error, AufsdError | OSError)]
        for error in unexpected:
            log.error("a background task met a fault of aufsd", task=self.name, exc_info=error)
        log.warning("a background task is tried again", task=self.name, error=said)

    def done(self, key: Hashable = None) -> None:
        """Note that a piece has succeeded."""
        if self.failing.pop(key, None) is not None:
            log.info("a background task goes on", task=self.name)

    def check(self) -> results.HealthCheck:
        """Its line of `health`."""
        if not self.failing:
            return results.HealthCheck(self.name, "ok", self.fine)
        return results.HealthCheck(self.name, "degraded", _several(list(self.failing.values())))


@dataclass(slots=True)
class Tasks:
    """The background tasks of a daemon, for `health`."""

    _tasks: dict[str, Task] = field(default_factory=dict)

    def add(self, name: str, fine: str) -> Task:
        """A task, reported from here on."""
        return self._tasks.setdefault(name, Task(name, fine))

    def checks(self) -> list[results.HealthCheck]:
        """A line of `health` for each."""
        return [task.check() for task in self._tasks.values()]


def leaves(error: Exception) -> Iterator[Exception]:
    """An exception, or those in a group of them."""
    if isinstance(error, ExceptionGroup):
        for below in error.exceptions:
            yield from leaves(below)
    else:
        yield error


def sentence(error: Exception) -> str:
    """What an exception says, for a person."""
    if isinstance(error, AufsdError):
        return error.message
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        name = errno.errorcode.get(error.errno or 0, "")
        return f"{where}{error.strerror}" + (f" ({name})" if name else "")
    return f"{type(error).__name__}: {error}"


def _several(sentences: list[str]) -> str:
    more = f"; and {len(sentences) - _NAMED} more" if len(sentences) > _NAMED else ""
    return "; ".join(sentences[:_NAMED]) + more
