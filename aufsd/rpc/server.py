"""Listens on the sockets, lets peers in, and drains when the daemon stops."""

import errno
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

import structlog
import trio

from aufsd.kernel.peer import identify
from aufsd.rpc import dispatch
from aufsd.rpc.admission import Admission, Allow, Settings, Statistics
from aufsd.rpc.calls import Operations
from aufsd.rpc.connection import Connection
from aufsd.rpc.listeners import Listener
from aufsd.rpc.methods import TABLE
from aufsd.rpc.reader import Reader
from aufsd.rpc.runner import Desk, Observe
from aufsd_client.errors import AufsdError, Overloaded

__all__ = ["Allow", "Listener", "Server", "Settings", "Statistics", "serve"]

log = structlog.get_logger(__name__)

# what accept(2) says when the machine or the process is out of something; it passes
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
_EXHAUSTED_PAUSE = 0.1  # seconds
# <linux/socket.h> has no name in Python for it: the peer's supplementary groups, since Linux 4.13
_SO_PEERGROUPS = 59
# bytes, four a group; Python's getsockopt takes no more (Modules/socketmodule.c)
_GROUPS = 1024


def _ignore(method: str, outcome: str, seconds: float) -> None:
    """Observe nothing."""


class Server:
    """What runs behind the listeners; `serve` makes it."""

    def __init__(self, driver: Operations, settings: Settings, observe: Observe) -> None:
        self._idle = trio.Event()
        self._admission = Admission(settings, on_idle=self._idle.set)
        self._desk = Desk(driver, dispatch.bindings(TABLE), self._admission, observe)
        self._reader = Reader(driver.turn)
        self._connections: set[Connection] = set()

    @property
    def settings(self) -> Settings:
        """The limits; assign others to have them hold from the next connection or call on."""
        return self._admission.settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._admission.settings = settings

    def statistics(self) -> Statistics:
        """A snapshot of the counts."""
        return self._admission.statistics()

    async def accept(self, listener: Listener) -> None:
        """Let peers in until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(listener.sock)
            try:
                sock, _ = listener.sock.accept()
            except OSError as error:
                # anything else is of the one connection that is gone again (accept(2))
                if error.errno in _EXHAUSTED:
                    log.error("cannot accept connections", error=error.strerror)
                    await trio.sleep(_EXHAUSTED_PAUSE)
                continue
            self._let_in(sock, monitor=listener.monitor)

    def _let_in(self, sock: socket.socket, *, monitor: bool) -> None:
        """Serve a peer from here on, or tell it why not. What goes wrong here is its alone."""
        try:
            self._admit(sock, monitor=monitor)
        except Overloaded as error:
            _turn_away(sock, error)
            sock.close()
        except Exception as error:
            log.error("connection failed", exc_info=error)
            sock.close()

    def _admit(self, sock: socket.socket, *, monitor: bool) -> None:
        sock.setblocking(False)
        pid, uid, gid = struct.unpack(
            "iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        peer, groups = identify(pid, uid, gid), _groups(sock)
        self._admission.admit(uid, monitor=monitor)
        try:
            connection = Connection(
                sock, peer, groups, self._desk, self._reader, monitor=monitor, ended=self._ended
            )
        except BaseException:
            self._admission.leave(uid, monitor=monitor)
            raise
        self._connections.add(connection)

    def _ended(self, connection: Connection) -> None:
        self._connections.remove(connection)
        self._admission.leave(connection.peer.uid, monitor=connection.monitor)

    async def run(
        self,
        listeners: Sequence[Listener],
        shutdown: trio.Event,
        task_status: trio.TaskStatus["Server"],
    ) -> None:
        """See `serve`."""
        try:
            async with trio.open_nursery() as reading:
                reading.start_soon(self._reader.run)
                async with trio.open_nursery() as accepting:
                    for listener in listeners:
                        accepting.start_soon(self.accept, listener)
                    task_status.started(self)
                    await shutdown.wait()
                    accepting.cancel_scope.cancel()
                for listener in listeners:
                    listener.close()
                await self._drain()
                reading.cancel_scope.cancel()
        finally:
            for connection in self._connections:
                connection.close()
            self._reader.close()
            for listener in listeners:
                listener.close()

    async def _drain(self) -> None:
        """Until no call runs, or the time is up."""
        until = trio.current_time() + self.settings.drain_timeout
        self._admission.draining = True
        self._admission.drain_until = until
        for connection in self._connections:
            connection.hurry(until)
        if not self._admission.in_flight:
            return
        log.info("draining", calls=self._admission.in_flight, seconds=self.settings.drain_timeout)
        with trio.move_on_at(until):
            await self._idle.wait()
        if self._admission.in_flight:
            log.warning("calls are cut off", calls=self._admission.in_flight)


def _turn_away(sock: socket.socket, error: AufsdError) -> None:
    """Tell a peer why. It is not waited for: this is for when there are too many."""
    with suppress(OSError):
        sock.send(dispatch.failure(None, error) + b"\n")
        sock.shutdown(socket.SHUT_RDWR)
        # unread data at close would reach the peer as ECONNRESET (net/unix/af_unix.c,
        # unix_release_sock); after the shutdown no more can come
        while sock.recv(1 << 16):
            pass


def _groups(sock: socket.socket) -> tuple[int, ...]:
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS)
    except OSError:
        # more than fit, which only an allow-list of one of the rest would miss; or an old kernel
        return ()
    return tuple(memoryview(raw).cast("I"))


async def serve(
    listeners: Sequence[Listener],
    driver: Operations,
    settings: Settings,
    *,
    shutdown: trio.Event,
    observe: Observe = _ignore,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the API on `listeners`, which are closed at the end, until `shutdown` is set.

    Then nobody new is let in, new calls are answered with ShuttingDown, and what runs may finish
    within `settings.drain_timeout` seconds. Cancelled: everything stops at once. `observe` is
    called after every call, with its method, its outcome and the seconds it took.
    """
    await Server(driver, settings, observe).run(listeners, shutdown, task_status)
