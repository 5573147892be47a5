"""The list of changes between two merged views, a page at a time."""

import base64
import binascii
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from aufsd.archive import compare
from aufsd.archive.requests import Settings
from aufsd.archive.view import Place
from aufsd.results import Change, Changes
from aufsd_client.errors import InvalidParams

# bytes of paths: what the daemon takes apart and puts together again in its event loop
_PAGE: Final = 4 << 20


def changes(
    now: list[Place], then: list[Place], settings: Settings, *, after: str, limit: int
) -> Changes:
    """One page: `limit` changes, or fewer that come to four megabytes of paths.

    `after` is the `next` of the page before: its last path in base64.

    Raises InvalidParams for an `after` that no page gave.
    """
    try:
        cursor = base64.b64decode(after, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidParams("`after` is not the `next` of a page") from None
    found = _listed(now, then, settings, cursor)
    page = []
    size = 0
    for each in islice(found, limit):
        page.append(each)
        size += len(each[1])
        if size >= _PAGE:
            break
    more = next(found, None) is not None
    last = base64.b64encode(page[-1][1]).decode() if page and more else ""
    return Changes([_change(kind, path) for kind, path in page], last)


def _listed(
    now: list[Place], then: list[Place], settings: Settings, cursor: bytes
) -> Iterator[tuple[compare.Kind, bytes]]:
    """Kind and path from the root, `/` first of all if it changed itself."""
    if then and not cursor and compare.root_differs(now[0], then[0], settings):
        yield "modify", b"/"
    parts = [part for part in cursor.split(b"/") if part]
    # a directory is listed if anything in it comes or goes, which is known only later: what
    # follows it has to wait till then
    undecided: list[int | None] = []
    waiting: list[tuple[compare.Kind, bytes] | None] = []
    passed = len(parts)
    for event in compare.events(now, then, settings, after=parts):
        if isinstance(event, compare.Leave):
            undecided.pop()
        else:
            if event.kind in ("add", "delete"):
                for depth, index in enumerate(undecided):
                    if index is not None:
                        held = waiting[index]
                        assert held is not None
                        waiting[index] = ("modify", held[1])
                        undecided[depth] = None
            path = b"/" + event.path
            # on the way to the cursor: told on an earlier page, if at all
            told = event.kind == "same" and len(undecided) < passed and _leads(path, parts)
            if event.kind == "same" and not told:
                undecided.append(len(waiting))
                waiting.append(("same", path))
            else:
                if not told:
                    waiting.append((event.kind, path))
                if event.below:
                    undecided.append(None)
        if not any(index is not None for index in undecided):
            yield from (held for held in waiting if held is not None and held[0] != "same")
            waiting.clear()
    yield from (held for held in waiting if held is not None and held[0] != "same")


def _leads(path: bytes, parts: Sequence[bytes]) -> bool:
    own = path[1:].split(b"/")
    return list(parts[: len(own)]) == own


def _change(kind: compare.Kind, path: bytes) -> Change:
    assert kind != "same"
    try:
        return Change(kind, path=path.decode())
    except UnicodeDecodeError:
        return Change(kind, path_base64=base64.b64encode(path).decode())
