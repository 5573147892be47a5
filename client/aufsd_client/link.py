"""One connection of a client that blocks. Standard library only."""

import math
import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from aufsd_client.address import reachable
from aufsd_client.wire import (
    READ_SIZE,
    ConnectionLost,
    LineSplitter,
    Reply,
    decode_reply,
    descriptor,
    encode_request,
    match,
    unreachable,
)

_CONNECT_PAUSE = 0.01  # seconds
# what poll(2) can wait, an int of milliseconds; Python refuses more
LONGEST = 2_147_483  # seconds


def ask(
    path: str,
    method: str,
    params: dict[str, object],
    *,
    fd: int | None = None,
    timeout: float | None = None,
) -> dict[str, object]:
    """One call over a new connection. Its result, not parsed."""
    deadline = deadline_after(timeout)
    link = Link(path, deadline)
    id = f"{os.getpid()}:{method}"
    try:
        reply = match(link.exchange(encode_request(id, method, params), fd, deadline), id)
    finally:
        link.close()
    if reply.error:
        raise reply.error
    return reply.result


def deadline_after(timeout: float | None) -> float | None:
    """The deadline (time.monotonic) of a call that begins now; None: none. ValueError for NaN."""
    if timeout is None or timeout == math.inf:
        return None
    if math.isnan(timeout):
        raise ValueError("a timeout is a number of seconds")
    return time.monotonic() + min(timeout, LONGEST)


class Link:
    """One connection; one call at a time."""

    def __init__(self, path: str, deadline: float | None) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lines = LineSplitter()
        try:
            with reachable(path) as short:
                self._connect(short, deadline)
        except TimeoutError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise unreachable(path, error) from error

    def _connect(self, path: str, deadline: float | None) -> None:
        while True:
            try:
                with _in_time(self._sock, deadline):
                    self._sock.connect(path)
            except BlockingIOError:
                # the backlog is full; with a timeout connect(2) does not wait for room
                time.sleep(_CONNECT_PAUSE)
            else:
                return

    def close(self) -> None:
        self._sock.close()

    def usable(self) -> bool:
        """Whether an idle connection is still open: the daemon may have ended."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def exchange(self, frame: bytes, fd: int | None, deadline: float | None) -> Reply:
        """Send a call and wait for its answer. Raises ConnectionLost, TimeoutError."""
        # the daemon's last answer says more than the broken pipe
        with suppress(BrokenPipeError, ConnectionResetError):
            self._send(memoryview(frame), fd, deadline)
        return self._receive(deadline)

    def _send(self, rest: memoryview, fd: int | None, deadline: float | None) -> None:
        ancillary = descriptor(fd)
        while rest:
            with _in_time(self._sock, deadline):
                rest = rest[self._sock.sendmsg([rest], ancillary, socket.MSG_NOSIGNAL) :]
            ancillary = []

    def _receive(self, deadline: float | None) -> Reply:
        while True:
            data = b""
            with suppress(ConnectionResetError), _in_time(self._sock, deadline):
                data = self._sock.recv(READ_SIZE)
            if not data:
                raise ConnectionLost("the daemon closed the connection before it answered")
            for line in self._lines.feed(data):
                return decode_reply(line)


@contextmanager
def _in_time(sock: socket.socket, deadline: float | None) -> Iterator[None]:
    """One operation on the socket, until the deadline (time.monotonic)."""
    late = TimeoutError("the daemon did not answer in time")
    if deadline is None:
        sock.settimeout(None)
    elif (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
    else:
        raise late
    try:
        yield
    except TimeoutError:
        raise late from None
