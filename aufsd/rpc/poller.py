"""All peers' sockets of one reader behind one epoll instance: who is ready, and who is gone.

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
from typing import Generic, TypeVar

import trio

P = TypeVar("P")

# what `ready` says of a socket: there is something to read, or nothing will come any more; it takes
# more; its peer has closed it, which is told once while it is not read
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
        """Watch a socket on behalf of `who`, for reading at first, until it is removed."""
        self._epoll.register(sock, select.EPOLLIN)
        self._of[sock.fileno()] = who

    def remove(self, sock: socket.socket) -> None:
        """Watch it no more; to be called before it is closed."""
        if self._of.pop(sock.fileno(), None):
            self._epoll.unregister(sock)

    def watch(self, sock: socket.socket, *, read: bool, write: bool) -> None:
        """Say from here on when it can be read, and when it takes more; a hang-up in any case."""
        events = (select.EPOLLIN if read else 0) | (select.EPOLLOUT if write else 0)
        # EPOLLET: a peer that is gone stays so, and is told of once
        self._epoll.modify(sock, events if read else events | select.EPOLLET)

    def wake(self) -> None:
        """Have `wait` return."""
        if self._waiting:
            self._waiting = False
            if self._wakeup < 0:
                self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._epoll.register(self._wakeup, select.EPOLLIN)
            os.eventfd_write(self._wakeup, 1)

    async def wait(self) -> None:
        """Until a socket is ready or `wake` is called. One task at a time."""
        self._waiting = True
        await trio.lowlevel.wait_readable(self._fd)
        self._waiting = False

    def ready(self, most: int = -1) -> Iterator[tuple[P, int]]:
        """The sockets that are ready now, with what they are ready for.

        Of more than `most` the others come first at the next call: the kernel puts those that it
        has told at the end of its list (fs/eventpoll.c, ep_send_events).
        """
        for fd, events in self._epoll.poll(0, most):
            if fd == self._wakeup:
                os.eventfd_read(fd)
            # one may be removed by what another one that was ready has brought about
            elif (who := self._of.get(fd)) is not None:
                yield who, events

    def close(self) -> None:
        """Close the epoll instance. Nothing may wait in `wait` any more."""
        self._epoll.close()
        if self._wakeup >= 0:
            os.close(self._wakeup)
