"""Listens on the sockets, accepts connections, and drains them when the daemon stops."""

import errno
import resource
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress

import structlog
import trio

from aufsd.driver import Driver
from aufsd.kernel.peer import groups, identify
from aufsd.rpc import dispatch
from aufsd.rpc.access_log import AccessLog
from aufsd.rpc.admission import Admission, Allow, ServerSettings, Statistics
from aufsd.rpc.connection import Connection
from aufsd.rpc.listeners import Listener
from aufsd.rpc.methods import TABLE
from aufsd.rpc.reader import Reader
from aufsd.rpc.runner import Observe, Shared
from aufsd_client.errors import AufsdError, Overloaded

__all__ = ["Allow", "Listener", "Server", "ServerSettings", "Statistics", "serve"]

log = structlog.get_logger(__name__)

# errors of accept(2) when the host or the process is short of something; they pass
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
_EXHAUSTED_PAUSE = 0.1  # seconds
# of the event loop's time: for calls of the monitor socket, and for accepting its connections
_MONITOR_SHARE, _MONITOR_ACCEPT_SHARE = 0.15, 0.05


def _ignore(method: str, outcome: str, seconds: float) -> None:
    """Observe nothing."""


class Server:
    """Serves the connections of the listeners; `serve` makes it."""

    def __init__(self, driver: Driver, settings: ServerSettings, observe: Observe) -> None:
        self._idle = trio.Event()
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._admission = Admission(settings, on_idle=self._idle.set, descriptors=descriptors)
        self._log = AccessLog()
        self._shared = Shared(driver, dispatch.register(TABLE), self._admission, observe, self._log)
        # the monitor socket needs no Tick: its methods do not change the table
        self._readers = {
            False: Reader(driver.tick, driver.tick.buffered),
            True: Reader(nullcontext(), share=_MONITOR_SHARE),
        }
        self._connections: set[Connection] = set()

    @property
    def settings(self) -> ServerSettings:
        """The limits. New ones hold from the next connection or call on."""
        return self._admission.settings

    @settings.setter
    def settings(self, settings: ServerSettings) -> None:
        self._admission.settings = settings

    def statistics(self) -> Statistics:
        """The counts as they are now."""
        return self._admission.statistics()

    async def accept(self, listener: Listener) -> None:
        """Accept connections until cancelled."""
        exhausted = ""
        while True:
            await trio.lowlevel.wait_readable(listener.sock)
            began = time.thread_time()
            try:
                sock, _ = listener.sock.accept()
            except OSError as error:
                # any other error is about a connection that is gone again (accept(2))
                if error.errno in _EXHAUSTED:
                    if not exhausted:
                        exhausted = error.strerror or ""
                        log.error("connections wait: cannot accept any", error=exhausted)
                    await trio.sleep(_EXHAUSTED_PAUSE)
                continue
            if exhausted:
                exhausted = ""
                log.info("connections are accepted again")
            self._let_in(sock, monitor=listener.monitor)
            if listener.monitor:
                took = time.thread_time() - began
                await trio.sleep(took * (1 / _MONITOR_ACCEPT_SHARE - 1))

    def _let_in(self, sock: socket.socket, *, monitor: bool) -> None:
        """Begin to serve a peer, or tell it why not. An exception ends its connection only."""
        try:
            self._admit(sock, monitor=monitor)
        except Overloaded as error:
            _turn_away(sock, error)
            sock.close()
        except OSError as error:
            # of the host: no memory, no descriptor, no room in epoll (max_user_watches, epoll(7))
            log.warning("connection refused", reason=error.strerror)
            _turn_away(sock, Overloaded(f"no connection can be had now: {error.strerror}"))
            sock.close()
        except Exception as error:
            log.error("connection failed", exc_info=error)
            sock.close()

    def _admit(self, sock: socket.socket, *, monitor: bool) -> None:
        sock.setblocking(False)
        pid, uid, gid = struct.unpack(
            "iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        peer, belongs = identify(sock, pid, uid, gid), groups(sock)
        self._admission.admit(uid, monitor=monitor)
        try:
            reader = self._readers[monitor]
            connection = Connection(
                sock, peer, belongs, self._shared, reader, monitor=monitor, ended=self._ended
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
                for reader in self._readers.values():
                    reading.start_soon(reader.run)
                reading.start_soon(self._log.run)
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
            for reader in self._readers.values():
                reader.close()
            for listener in listeners:
                listener.close()
            self._log.tell()

    async def _drain(self) -> None:
        """Wait until no call runs, for `drain_timeout` seconds at most."""
        until = trio.current_time() + self.settings.drain_timeout
        self._admission.draining = True
        if not self._admission.in_flight:
            return
        log.info("draining", calls=self._admission.in_flight, seconds=self.settings.drain_timeout)
        with trio.move_on_at(until):
            await self._idle.wait()
        if self._admission.in_flight:
            log.warning("calls are cut off", calls=self._admission.in_flight)


def _turn_away(sock: socket.socket, error: AufsdError) -> None:
    """Tell a peer why it is not served. Never waits: there are too many peers already."""
    with suppress(OSError):
        sock.send(dispatch.failure(None, error) + b"\n")
        sock.shutdown(socket.SHUT_RDWR)
        # a close with unread data gives the peer ECONNRESET in place of the answer
        # (net/unix/af_unix.c, unix_release_sock); after the shutdown no more data can come
        while sock.recv(1 << 16):
            pass


async def serve(
    listeners: Sequence[Listener],
    driver: Driver,
    settings: ServerSettings,
    *,
    shutdown: trio.Event,
    observe: Observe = _ignore,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the API on `listeners`, which are closed at the end, until `shutdown` is set.

    Then no connection is accepted, new calls are answered with ShuttingDown, and running calls may
    end within `settings.drain_timeout` seconds. Cancelled: everything stops at once. `observe` is
    called after every call, with its method, its outcome and the seconds it took.
    """
    await Server(driver, settings, observe).run(listeners, shutdown, task_status)
