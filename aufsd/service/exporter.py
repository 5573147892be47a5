"""Metrics over HTTP for a Prometheus on this host: as much of HTTP/1.1 as a scrape needs.

One request per connection, GET or HEAD of /metrics. Every user of the host can connect, and reads
no more than on the monitor socket, which is open to everybody too.
"""

import errno
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import trio

from aufsd import results
from aufsd.tasks import Task

# at a time; others wait in the kernel's queue
_CONNECTIONS = 8
_REQUEST = 8192  # bytes of a request at most
_WITHIN = 5.0  # seconds for one connection
_EXHAUSTED_PAUSE = 1.0  # seconds
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}


def bind(address: str, port: int) -> socket.socket:
    """A listening socket, the caller's. Raises OSError that names the address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # closed connections of the last daemon still use the port for a while
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            sock.listen(_CONNECTIONS)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        where = f"metrics_listen = {address}:{port}"
        raise OSError(error.errno, error.strerror, where) from None
    return sock


async def serve(sock: socket.socket, render: Callable[[], results.Metrics], task: Task) -> None:
    """Answer scrapes until cancelled, then close the socket. `task` records failures."""
    slots = trio.Semaphore(_CONNECTIONS)
    with trio.socket.from_stdlib_socket(sock) as listener:
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                await slots.acquire()
                try:
                    peer, _ = await listener.accept()
                except BaseException:
                    slots.release()
                    raise
                nursery.start_soon(_converse, trio.SocketStream(peer), render, slots, task)

            await task.repeat(partial(_passing, accept), latest=_EXHAUSTED_PAUSE)


async def _passing(accept: Callable[[], Awaitable[None]]) -> None:
    try:
        await accept()
    except OSError as error:
        # any other error is about a connection that is gone again (accept(2))
        if error.errno in _EXHAUSTED:
            raise


async def _converse(
    stream: trio.SocketStream,
    render: Callable[[], results.Metrics],
    slots: trio.Semaphore,
    task: Task,
) -> None:
    try:
        # a failure is reported until the next good scrape
        await task.tried(partial(_exchange, stream, render), "scrape")
    finally:
        slots.release()


async def _exchange(stream: trio.SocketStream, render: Callable[[], results.Metrics]) -> None:
    async with stream:
        with trio.move_on_after(_WITHIN), suppress(trio.BrokenResourceError):
            head = await _head(stream)
            if head:
                try:
                    answer = _answer(head, render)
                except Exception:
                    text = "the metrics could not be read; the log of aufsd says why\n"
                    await stream.send_all(_response("500 Internal Server Error", text))
                    raise
                await stream.send_all(answer)
                # a close with unread data would reset the connection (tcp(7)), and lose the answer
                await stream.send_eof()
                while await stream.receive_some(_REQUEST):
                    pass


async def _head(stream: trio.SocketStream) -> bytes:
    """The head of a request, up to its empty line or _REQUEST bytes; b"" if none came."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _REQUEST:
        data = await stream.receive_some(_REQUEST)
        if not data:
            return b""
        head += data
    return head


def _answer(head: bytes, render: Callable[[], results.Metrics]) -> bytes:
    parts = head.split(b"\r\n", 1)[0].split(b" ")
    if b"\r\n\r\n" not in head or len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
        return _response("400 Bad Request", "this is no HTTP request\n")
    method, target, _ = parts
    if target.partition(b"?")[0] != b"/metrics":
        return _response("404 Not Found", "only /metrics is here\n")
    if method not in (b"GET", b"HEAD"):
        return _response("405 Method Not Allowed", "metrics are only read\n", "Allow: GET, HEAD")
    found = render()
    response = _response("200 OK", found.text, f"Content-Type: {found.content_type}")
    return response.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == b"HEAD" else response


def _response(status: str, text: str, *headers: str) -> bytes:
    body = text.encode()
    if not headers or "Content-Type" not in headers[0]:
        headers = (*headers, "Content-Type: text/plain; charset=utf-8")
    head = (f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "Connection: close")
    return "\r\n".join((*head, "", "")).encode() + body
