"""All peers' sockets behind one epoll instance: who has sent something, and who is gone.

Trio waits for one descriptor in each task: a task switch and three system calls for each line that
comes in, which is more than a short call costs. All who have sent something by the time that we
look cost one wait together.

A read that returns nothing says only that the peer will send no more; it may have shut down its
sending half and wait for answers. EPOLLHUP means that both halves are down (net/unix/af_unix.c,
unix_poll), and epoll(7) reports it unasked, even while a socket is not read.
"""

import os
import select
import socket
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import trio


class Hearing(Protocol):
    """Who is told of a socket."""

    def hang_up(self) -> None:
        """The peer is gone. May be called more than once."""


H = TypeVar("H", bound=Hearing)

# EPOLLET: that a peer is gone is told once, for it stays so
_HUSHED = select.EPOLLET
_GONE = select.EPOLLHUP | select.EPOLLERR


class Sockets(Generic[H]):
    """Owns the epoll instance, not the sockets."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._fd = self._epoll.fileno()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._of: dict[int, H] = {}

    def add(self, sock: socket.socket, who: H) -> None:
        """Listen to a socket on behalf of `who`, until it is removed."""
        self._epoll.register(sock, select.EPOLLIN)
        self._of[sock.fileno()] = who

    def remove(self, sock: socket.socket) -> None:
        """Listen to it no more; to be called before it is closed."""
        if self._of.pop(sock.fileno(), None):
            self._epoll.unregister(sock)

    def hush(self, sock: socket.socket) -> None:
        """Hear only that its peer is gone."""
        self._epoll.modify(sock, _HUSHED)

    def listen(self, sock: socket.socket) -> None:
        """Hear again what it sends; what has come meanwhile is told."""
        self._epoll.modify(sock, select.EPOLLIN)

    def ring(self) -> None:
        """Have `wait` return."""
        os.eventfd_write(self._bell, 1)

    async def wait(self) -> None:
        """Until somebody has something to say. One task at a time."""
        await trio.lowlevel.wait_readable(self._fd)

    def heard(self) -> Iterator[H]:
        """Who has something to read, or has sent all; hang-ups are told on the way."""
        for fd, flags in self._epoll.poll(0):
            if fd == self._bell:
                os.eventfd_read(fd)
                continue
            who = self._of[fd]
            if flags & _GONE:
                who.hang_up()
            if flags & select.EPOLLIN:
                yield who

    def close(self) -> None:
        """Close the epoll instance. Nothing may wait in `wait` any more."""
        self._epoll.close()
        os.close(self._bell)
