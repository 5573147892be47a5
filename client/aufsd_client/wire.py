"""Frames and messages: bytes in, lines out; no socket is touched here. Standard library only.

One JSON value a line, UTF-8, ended by a newline (docs/api.md, "Transport"). The daemon takes the
splitter from here; the encoding and decoding is the client's.
"""

import json
import socket
import struct
from typing import NamedTuple

from aufsd_client.errors import AufsdError, from_wire

DEFAULT_SOCKET = "/run/aufsd/aufsd.sock"
MONITOR_SOCKET = "/run/aufsd/monitor.sock"
# the longest line of a request, without its newline
MAX_LINE = 1 << 20
# how much a reader takes from its socket at a time
READ_SIZE = 1 << 16


class DaemonUnreachable(ConnectionError):
    """Nobody listens on the socket, or this user may not open it. Nothing was asked."""


class ConnectionLost(ConnectionError):
    """The connection broke during a call: whether the daemon carried it out is not known."""


class BadReply(Exception):
    """What came back is not an answer to the call; the daemon is another, or newer, program."""


class LineSplitter:
    """Feed it what arrives, get the lines that are whole. No byte is looked at twice.

    With a `limit` (bytes, 0 for none) a longer line sets `overlong`; what was whole before it is
    still returned, and nothing after it is.
    """

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self._rest = bytearray()
        self.overlong = False

    @property
    def pending(self) -> int:
        """How many bytes of an unfinished line are held."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their newlines."""
        if self.overlong:
            return []
        lines = data.split(b"\n")
        tail = lines.pop()
        if lines and self._rest:
            self._rest += lines[0]
            lines[0] = bytes(self._rest)
            self._rest.clear()
        self._rest += tail
        if not self._limit:
            return lines
        for index, line in enumerate(lines):
            if len(line) > self._limit:
                return self._stop(lines[:index])
        if len(self._rest) > self._limit:
            return self._stop(lines)
        return lines

    def _stop(self, lines: list[bytes]) -> list[bytes]:
        self.overlong = True
        self._rest.clear()
        return lines


class Reply(NamedTuple):
    """One answer: `error` or, without one, `result`."""

    id: object
    result: dict[str, object]
    error: AufsdError | None = None


def unreachable(path: str, error: OSError) -> DaemonUnreachable:
    """Why connecting failed, and what to do, in a sentence."""
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError, NotADirectoryError)):
        return DaemonUnreachable(
            f"no daemon listens on {path}: start it (systemctl start aufsd, or aufsd serve), or "
            "name the socket that it listens on"
        )
    if isinstance(error, PermissionError):
        return DaemonUnreachable(
            f"this user may not open {path}: become root, or join the group aufsd"
        )
    return DaemonUnreachable(f"{path}: {error.strerror or error}")


def descriptor(fd: int | None) -> list[tuple[int, int, bytes]]:
    """The ancillary data that sends a descriptor along (unix(7), SCM_RIGHTS)."""
    if fd is None:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]


_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def encode_request(id: str, method: str, params: dict[str, object]) -> bytes:
    """One call as a line."""
    message = {"jsonrpc": "2.0", "method": method, "params": params, "id": id}
    # in ASCII: a lone surrogate, as os.fsdecode makes, reaches the daemon so, which refuses it
    return _encode(message).encode() + b"\n"


def decode_reply(line: bytes) -> Reply:
    """The answer on a line, or BadReply."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as fault:
        raise BadReply(f"the answer is not JSON: {fault}") from None
    if not isinstance(message, dict):
        raise BadReply("the answer is not a JSON-RPC reply")
    id, error, result = message.get("id"), message.get("error"), message.get("result")
    if isinstance(error, dict):
        return Reply(id, {}, from_wire(error))
    if not isinstance(result, dict):
        raise BadReply("the answer has neither a result object nor an error")
    return Reply(id, result)


def match(reply: Reply, id: str) -> Reply:
    """The reply if it is the one to the call `id`; else BadReply, or the connection's own error."""
    if reply.id is None and reply.error:
        raise reply.error
    if reply.id != id:
        raise BadReply("the answer is to another call")
    return reply
