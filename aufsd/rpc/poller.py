"""One epoll instance for all sockets of a reader: which are ready, and whose peers are gone.

Trio would wait for each descriptor in a task of its own. That is a task switch and three system
calls for each line, more than a short call takes. Here one wait serves all sockets that are ready.

A read of nothing means only that the peer sends no more. It may have shut down its sending half and
wait for answers. EPOLLHUP means that both halves are down (net/unix/af_unix.c, unix_poll). epoll(7)
reports it always, even for a socket that is watched for nothing.
"""

import os
import select
import socket
from collections.abc import Iterator
from typing import Generic, TypeVar

import trio

P = TypeVar("P")

# what `ready` reports. READABLE: there is data, or the end. WRITABLE: it takes more. GONE: the peer
# has closed it; reported once while the socket is not watched for reading
READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
GONE = select.EPOLLHUP | select.EPOLLERR


class Poller(Generic[P]):
    """Owns the epoll instance, not the sockets."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._fd = self._epoll.fileno()
        self._wakeup = -1
        self._waiting = False
        self._of: dict[int, P] = {}

    def add(self, sock: socket.socket, who: P) -> None:
        """Watch a socket, for reading at first. `ready` reports it as `who`."""
        self._epoll.register(sock, select.EPOLLIN)
        self._of[sock.fileno()] = who

    def remove(self, sock: socket.socket) -> None:
        """Stop watching a socket. Call it before the socket is closed."""
        if self._of.pop(sock.fileno(), None):
            self._epoll.unregister(sock)

    def watch(self, sock: socket.socket, *, read: bool, write: bool) -> None:
        """Change what a socket is watched for. A hang-up is always reported."""
        events = (select.EPOLLIN if read else 0) | (select.EPOLLOUT if write else 0)
        # EPOLLET: a peer that is gone is reported once, and not again and again
        self._epoll.modify(sock, events if read else events | select.EPOLLET)

    def wake(self) -> None:
        """Make `wait` return."""
        if self._waiting:
            self._waiting = False
            if self._wakeup < 0:
                self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._epoll.register(self._wakeup, select.EPOLLIN)
            os.eventfd_write(self._wakeup, 1)

    async def wait(self) -> None:
        """Wait until a socket is ready or `wake` is called. One task at a time."""
        self._waiting = True
        await trio.lowlevel.wait_readable(self._fd)
        self._waiting = False

    def ready(self, most: int = -1) -> Iterator[tuple[P, int]]:
        """The sockets that are ready now, and what for; at most `most` of them.

        The others come first at the next call, because the kernel moves those that it has reported
        to the end of its list (fs/eventpoll.c, ep_send_events).
        """
        for fd, events in self._epoll.poll(0, most):
            if fd == self._wakeup:
                os.eventfd_read(fd)
            # handling one socket may have removed another one of this list
            elif (who := self._of.get(fd)) is not None:
                yield who, events

    def close(self) -> None:
        """Close the epoll instance. No task may be in `wait`."""
        self._epoll.close()
        if self._wakeup >= 0:
            os.close(self._wakeup)
