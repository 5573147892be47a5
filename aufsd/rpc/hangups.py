"""Told when a peer is gone, even while its connection is not read.

A read that returns nothing says only that the peer will send no more; it may have shut down its
sending half and wait for answers. EPOLLHUP means that both halves are down (net/unix/af_unix.c,
unix_poll), and epoll(7) reports it unasked. One epoll instance watches all connections for it.
"""

import select
import socket
from collections.abc import Callable

import trio


class Hangups:
    """Owns the epoll instance, not the sockets."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._gone: dict[int, Callable[[], None]] = {}

    def watch(self, sock: socket.socket, gone: Callable[[], None]) -> None:
        """Have `gone` called, once, when the peer of `sock` has closed it."""
        # edge-triggered: a peer that is gone stays so, and is told once
        self._epoll.register(sock, select.EPOLLET)
        self._gone[sock.fileno()] = gone

    def forget(self, sock: socket.socket) -> None:
        """Stop watching; to be called before `sock` is closed."""
        if self._gone.pop(sock.fileno(), None):
            self._epoll.unregister(sock)

    async def run(self) -> None:
        """Tell of hang-ups until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for fd, flags in self._epoll.poll(0):
                if flags & (select.EPOLLHUP | select.EPOLLERR) and fd in self._gone:
                    self._gone[fd]()

    def close(self) -> None:
        """Close the epoll instance. Nothing may wait in `run` any more."""
        self._epoll.close()
