"""Sorted rows, and sets of names, for a million of them.

They are kept as bytes, one after the other. So each takes little more than its length. A list or a
set would take three to ten times as much.
"""

from collections.abc import Iterable, Iterator
from heapq import merge
from typing import Final

# no name has one
_END: Final = b"/"
# bytes that are sorted at a time, and that are taken apart at a time
_RUN: Final = 1 << 18
_PIECE: Final = 1 << 11
# rows that a list holds at a time, and that may wait in one for long
AT_A_TIME: Final = 1 << 12
_SOME: Final = 64
# names in a set, before they are spread over so many strings
_FEW: Final = 1 << 12
_STRINGS: Final = 1 << 12


class Ordered:
    """Rows without a slash, to be gone through in order once all were added."""

    __slots__ = ("_runs", "_tail")

    def __init__(self) -> None:
        self._tail = bytearray()
        self._runs: list[bytes] = []

    def add(self, row: bytes) -> None:
        """One more; one that is there already comes twice."""
        tail = self._tail
        tail += row
        tail += _END
        if len(tail) > _RUN:
            self._sort()

    def add_all(self, rows: list[bytes]) -> None:
        """Several more; the list is empty then."""
        self._tail += _END.join(rows)
        self._tail += _END
        rows.clear()
        if len(self._tail) > _RUN:
            self._sort()

    def _sort(self) -> None:
        rows = bytes(self._tail).split(_END)
        # behind the last one is nothing
        del rows[-1]
        rows.sort()
        self._runs.append(_END.join(rows))
        self._tail.clear()

    def is_empty(self) -> bool:
        """Whether there is no row."""
        return not self._tail and not self._runs

    def __iter__(self) -> Iterator[bytes]:
        if self._tail:
            self._sort()
        runs = self._runs
        return _rows(runs[0]) if len(runs) == 1 else merge(*map(_rows, runs))


def _rows(run: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(run):
        end = run.find(_END, at + _PIECE)
        if end < 0:
            end = len(run)
        yield from run[at:end].split(_END)
        at = end + 1


def in_order(found: Ordered, rows: list[bytes]) -> Iterator[bytes]:
    """Go through the rows of both; a list of a few is left as it is, which is faster."""
    if found.is_empty() and len(rows) <= _SOME:
        rows.sort()
        return iter(rows)
    if rows:
        found.add_all(rows)
    return iter(found)


def once(rows: Iterable[bytes]) -> Iterator[bytes]:
    """Ordered rows, each a single time."""
    last = None
    for row in rows:
        if row != last:
            last = row
            yield row


class Seen:
    """Names that were met, without a slash."""

    __slots__ = ("_few", "_many")

    def __init__(self) -> None:
        self._few: set[bytes] = set()
        self._many: list[bytearray] = []

    def add(self, name: bytes) -> bool:
        """Take a name in; whether it is new."""
        if name in self:
            return False
        if not self._many:
            self._few.add(name)
            if len(self._few) <= _FEW:
                return True
            self._many = [bytearray(_END) for _ in range(_STRINGS)]
            few, self._few = self._few, set()
            for each in few:
                self.add(each)
            return True
        string = self._string(name)
        string += name
        string += _END
        return True

    def __contains__(self, name: bytes) -> bool:
        if not self._many:
            return name in self._few
        return self._string(name).find(b"/%b/" % name) >= 0

    def discard(self, name: bytes) -> None:
        """Forget a name."""
        if not self._many:
            self._few.discard(name)
            return
        string = self._string(name)
        at = string.find(b"/%b/" % name)
        if at >= 0:
            del string[at : at + len(name) + 1]

    def _string(self, name: bytes) -> bytearray:
        return self._many[hash(name) % _STRINGS]
