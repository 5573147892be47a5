"""Counts the progress of a job, and collects the warnings for its result."""

import time
from collections.abc import Callable
from typing import Final

_MANY: Final = 100
_PAUSE: Final = 0.25  # seconds between two reports


class Meter:
    """Bytes of the stream and entries so far, reported now and then; and the warnings."""

    __slots__ = (
        *("_clock", "_next", "_report", "_unsaid"),
        *("bytes", "entries", "waiting_since", "warned"),
    )

    def __init__(
        self,
        report: Callable[[int, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bytes = 0
        self.entries = 0
        # by time.monotonic; for the other end of the stream, and not for the disk
        self.waiting_since: float | None = None
        self.warned: list[str] = []
        self._unsaid = 0
        self._report = report
        self._clock = clock
        self._next = clock() + _PAUSE

    def tick(self) -> None:
        """Report, if the last report is old enough. Called about once for each megabyte."""
        now = self._clock()
        if now >= self._next:
            self._next = now + _PAUSE
            self._report(self.bytes, self.entries)

    def warn(self, sentence: str) -> None:
        """Add a warning to the result. After a hundred they are only counted."""
        if len(self.warned) < _MANY:
            self.warned.append(sentence)
        else:
            self._unsaid += 1

    def warnings(self) -> list[str]:
        """The sentences for the result."""
        return [*self.warned, f"and {self._unsaid} more"] if self._unsaid else self.warned


def shown(name: bytes) -> str:
    """A name inside a layer, for a sentence: other bytes than printable UTF-8 are escaped."""
    text = name.decode("utf-8", "backslashreplace")
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return escaped if len(escaped) <= 300 else f"{escaped[:150]}...{escaped[-150:]}"
