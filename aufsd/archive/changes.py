"""Lists the changes between two merged views, one page at a time."""

import base64
import binascii
from dataclasses import dataclass
from typing import Final

from aufsd.archive import compare
from aufsd.archive.requests import Settings
from aufsd.archive.view import Place
from aufsd.results import Change, Changes
from aufsd.store.walk import Way
from aufsd_client.errors import InvalidParams

# bytes of paths of one page, which the daemon decodes and encodes in its event loop
_PAGE: Final = 4 << 20


def changes(
    now: list[Place], then: list[Place], settings: Settings, *, after: str, limit: int
) -> Changes:
    """One page: `limit` changes, or fewer with four megabytes of paths.

    `after` is the `next` of the last page, which is its last path in base64. Raises InvalidParams
    for any other `after`.
    """
    try:
        cursor = base64.b64decode(after, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidParams("`after` is not the `next` of a page") from None
    page = _Page(limit)
    if then and not cursor and compare.root_differs(now[0], then[0], settings):
        page.add("modify", Way(None, b""))
    parts = [part for part in cursor.split(b"/") if part]
    for event in compare.events(now, then, settings, after=parts):
        if isinstance(event, compare.Leave):
            page.leave()
        else:
            # a directory above the cursor was listed on an earlier page, if at all
            page.take(event.kind, event.way, below=event.below, told=event.passed)
        if page.is_decided():
            break
    return page.result()


@dataclass(slots=True)
class _Row:
    kind: compare.Kind
    way: Way

    @property
    def size(self) -> int:
        return self.way.size + 1


class _Page:
    """Changes in their order, up to the first that is on the next page.

    A directory is listed if anything in it comes or goes, which is known only later: till then it
    is "same", and what follows it waits. What is behind the end of the page in either case is not
    kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rows: list[_Row] = []
        # of the directories that we are in: its row, None for one that does not wait
        self._inside: list[_Row | None] = []
        # those among them that are "same" yet
        self._waiting: list[_Row] = []
        # how many rows are certain, and bytes of their paths
        self._certain = 0
        self._size = 0

    def add(self, kind: compare.Kind, way: Way) -> _Row | None:
        """Put a row at the end, if that may be on this page."""
        if self._is_full():
            return None
        row = _Row(kind, way)
        self._rows.append(row)
        self._count(row)
        return row

    def take(self, kind: compare.Kind, way: Way, *, below: bool, told: bool) -> None:
        """An event; `told`: not on this page."""
        if kind in ("add", "delete"):
            for waiting in self._waiting:
                waiting.kind = "modify"
                self._count(waiting)
            self._waiting.clear()
        row = None if told else self.add(kind, way)
        if below:
            waits = row is not None and row.kind == "same"
            self._inside.append(row if waits else None)
            if row is not None and waits:
                self._waiting.append(row)

    def leave(self) -> None:
        """The end of a directory."""
        row = self._inside.pop()
        if row is None or row.kind != "same":
            return
        self._waiting.pop()
        if self._rows[-1] is row:
            self._rows.pop()

    def is_decided(self) -> bool:
        """Whether nothing that comes can change the page."""
        return not self._waiting and self._is_full()

    def _count(self, row: _Row) -> None:
        if row.kind != "same":
            self._certain += 1
            self._size += row.size

    def _is_full(self) -> bool:
        """Whether one more than the page holds is there."""
        last = self._rows[-1].size if self._rows else 0
        return self._certain > self._limit or self._size - last >= _PAGE

    def result(self) -> Changes:
        """The page."""
        found = [row for row in self._rows if row.kind != "same"]
        count = size = 0
        for row in found[: self._limit]:
            count += 1
            size += row.size
            if size >= _PAGE:
                break
        page = [(row.kind, b"/" + row.way.path()) for row in found[:count]]
        last = base64.b64encode(page[-1][1]).decode() if page and count < len(found) else ""
        return Changes([_change(kind, path) for kind, path in page], last)


def _change(kind: compare.Kind, path: bytes) -> Change:
    assert kind != "same"
    try:
        return Change(kind, path=path.decode())
    except UnicodeDecodeError:
        return Change(kind, path_base64=base64.b64encode(path).decode())
