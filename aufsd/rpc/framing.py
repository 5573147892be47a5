"""Cuts what arrives into lines, and recognises input that is not one JSON value a line. Pure.

A client that speaks HTTP, or sends JSON over several lines, is told so in one sentence. Nothing
that it sends is carried out, because a line of an HTTP body, or a middle line of a JSON value, may
look like a call.
"""

import json
import re

from aufsd.rpc import dispatch
from aufsd_client.errors import InvalidRequest, ParseError

_NEWLINE = b"\n"
# bytes of a value over several lines, after which its connection is refused
_UNFINISHED = 4096
# The first line of an HTTP request, or of what has lines like it (RFC 9112, section 3), whatever
# the method is called and however it is written; one of HTTP/0.9, which has no version; and a
# header, which may be the first that we see. No JSON begins so. Blank lines may come first.
_METHOD = re.compile(rb"[^\s{\[\"]\S{0,63}[ \t]+\S")
_VERSION = re.compile(rb"[ \t][a-z]+/\d(?:\.\d)?$", re.IGNORECASE)
_BARE = re.compile(
    rb"(?:get|head|post|put|delete|connect|options|trace|patch)[ \t]+\S|[a-z][a-z0-9-]{0,63}:",
    re.IGNORECASE,
)
# more than a version has
_TAIL = 32
_BOM = b"\xef\xbb\xbf"
# JSON's white space but the newline (RFC 8259, section 2) may come before
_FIRST = re.compile(rb"[^ \t\r]")
# what a bracket is no bracket in; no string goes over several lines (RFC 8259, section 7)
_STRING = re.compile(rb'"(?:[^"\\\n]|\\.)*"')
# longer lines that are no JSON are not read again for their id
_SALVAGED = 64 << 10


class ReceiveBuffer:
    """Takes what arrives, and gives out whole lines. No byte is searched twice.

    A line longer than `limit` bytes raises InvalidRequest; after that no line can be taken out.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()
        # bytes without a newline
        self._searched = 0

    def __len__(self) -> int:
        return len(self._data)

    @property
    def unsearched(self) -> bool:
        """Whether there may be another whole line."""
        return self._searched < len(self._data)

    def feed(self, data: bytes) -> None:
        """Take what was read."""
        self._data += data

    def next_line(self) -> bytes | None:
        """The next whole line, without its newline; None if there is none."""
        end = self._data.find(_NEWLINE, self._searched)
        if (end if end >= 0 else len(self._data)) > self._limit:
            raise InvalidRequest(f"a line of a request has at most {self._limit} bytes here")
        if end < 0:
            self._searched = len(self._data)
            return None
        line = bytes(self._data[:end])
        del self._data[: end + 1]
        self._searched = 0
        return line

    def begins_batch(self) -> bool:
        """Whether the next line begins an array."""
        found = _FIRST.search(self._data)
        return found is not None and found[0] == b"["

    def has_line(self) -> bool:
        """Whether there is another whole line."""
        return self._data.find(_NEWLINE, self._searched) >= 0

    def clear(self) -> None:
        """Forget everything."""
        self._data.clear()
        self._searched = 0


def is_http(line: bytes) -> bool:
    """Whether a line is the first one of an HTTP request, or a header of one."""
    if _BARE.match(line):
        return True
    return bool(_METHOD.match(line) and _VERSION.search(line.rstrip()[-_TAIL:]))


HTTP = InvalidRequest(
    "this is an HTTP request, and this socket speaks JSON-RPC, one JSON value a line: use aufsctl, "
    "or socat - UNIX-CONNECT:SOCKET; nothing of the request is carried out"
)


def explain(line: bytes, error: ParseError) -> ParseError:
    """The error of a line that is no JSON, with advice for common mistakes."""
    if not line.strip():
        return ParseError("an empty line: a request is one JSON value on one line")
    if line.startswith(_BOM):
        return ParseError("a byte order mark stands before the JSON: send UTF-8 without one")
    if Unfinished.begins_with(line):
        return ParseError(
            "the JSON value does not end on its line: send each request on one line (jq -c); "
            "nothing of this one is carried out"
        )
    return error


def salvaged(line: bytes) -> object:
    """An object with the id of a line that is JSON but for its encoding or a number; else None.

    Such a line is refused, but the id is there to be read, and some clients wait for it for ever: a
    byte order mark, bytes that are no UTF-8, half of a surrogate pair, a number that is too large.
    """
    if len(line) > _SALVAGED or b'"id"' not in line:
        return None
    text = line.removeprefix(_BOM).decode("utf-8", "replace")
    try:
        found = json.loads(text)
        id = found["id"]
        # as it was sent, and so that it can be said again
        dispatch.decode(json.dumps(id, allow_nan=False, ensure_ascii=False).encode())
    except (KeyError, TypeError, ValueError, RecursionError, ParseError):
        return None
    return {"id": id} if "\N{REPLACEMENT CHARACTER}" not in str(id) else None


class Unfinished:
    """A JSON value over several lines, which recognises the lines that belong to it.

    The first line was answered with an error. A further line belongs to the value if all lines
    together are a whole value or the beginning of one.
    """

    def __init__(self, first: bytes) -> None:
        self._text = first
        # the value is complete, and the next line is a new one
        self.ended = False

    @staticmethod
    def begins_with(line: bytes) -> bool:
        """Whether a line that is no JSON is the beginning of an object or an array."""
        if line.lstrip()[:1] not in (b"{", b"[") or len(line) > _UNFINISHED:
            return False
        return not _is_whole(line) and _may_go_on(line)

    def takes(self, line: bytes) -> bool:
        """Whether the line belongs to the value. Raises ParseError if the value is too long."""
        text = self._text + b"\n" + line
        if _is_whole(text):
            self.ended = True
            return True
        if not _may_go_on(text):
            return False
        if len(text) > _UNFINISHED:
            raise ParseError(
                f"the JSON value that began on an earlier line does not end within {_UNFINISHED} "
                "bytes: send each request on one line"
            )
        self._text = text
        return True


def _is_whole(text: bytes) -> bool:
    try:
        dispatch.decode(text)
    except ParseError:
        return False
    return True


def _may_go_on(text: bytes) -> bool:
    try:
        dispatch.decode(text)
    except ParseError as error:
        # msgspec's words for JSON that ends too early; it says so of half a surrogate pair too
        if "truncated" in error.message:
            rest = _STRING.sub(b"", text)
            return b'"' not in rest and rest.count(b"{") + rest.count(b"[") > (
                rest.count(b"}") + rest.count(b"]")
            )
    return False


INSIDE = InvalidRequest(
    "this line stands inside of a JSON value that began on an earlier line, so it is not carried "
    "out: send each request on one line"
)
