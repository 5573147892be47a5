"""Descriptors held in reserve, for a step that may not fail for want of one."""

import os
from contextlib import suppress
from typing import Final

_PLACE: Final = os.O_PATH | os.O_CLOEXEC


class Spare:
    """Holds descriptors until `release`. OSError (EMFILE, ENFILE) if there are not so many."""

    def __init__(self, count: int) -> None:
        self._held: list[int] = []
        try:
            for _ in range(count):
                more = os.dup(self._held[0]) if self._held else os.open("/", _PLACE)
                self._held.append(more)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Close them, for others to be opened. Harmless if it was done."""
        while self._held:
            with suppress(OSError):
                os.close(self._held.pop())
