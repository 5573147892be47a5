"""Rows in the order of their bytes, such as the names of a directory with a million of them.

They are kept as bytes, one behind the other, and sorted a piece at a time: a row takes little more
than its length, where a list of them would take three to ten times as much.
"""

from collections.abc import Iterable, Iterator
from heapq import merge
from typing import Final

# no name has one
_END: Final = b"/"
# bytes that are sorted at a time, and that are taken apart at a time
_RUN: Final = 1 << 20
_PIECE: Final = 1 << 11


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

    def _sort(self) -> None:
        rows = bytes(self._tail).split(_END)
        # behind the last one is nothing
        del rows[-1]
        rows.sort()
        self._runs.append(_END.join(rows))
        self._tail.clear()

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


def once(rows: Iterable[bytes]) -> Iterator[bytes]:
    """Ordered rows, each a single time."""
    last = None
    for row in rows:
        if row != last:
            last = row
            yield row
