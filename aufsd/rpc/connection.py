"""One peer's socket: what comes in is cut into lines and handed to the runner, in order."""

import socket
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import structlog
import trio

from aufsd.kernel.peer import Peer
from aufsd.rpc import dispatch
from aufsd.rpc.descriptors import MAX_UNCLAIMED, Descriptors
from aufsd.rpc.outbox import Outbox
from aufsd.rpc.reader import Reader
from aufsd.rpc.runner import Desk, Runner
from aufsd.rpc.stepping import first_step
from aufsd_client.errors import AufsdError, InvalidRequest, ParseError
from aufsd_client.wire import MAX_LINE, READ_SIZE, LineSplitter

# room for twice as many descriptors as may wait; the kernel closes what does not fit
_ANCILLARY = socket.CMSG_SPACE(2 * MAX_UNCLAIMED * 4)
# how much of an overlong line is read and thrown away, and for how long, so that a peer that
# writes before it reads comes to see why
_LINGER_BYTES, _LINGER_SECONDS = 16 << 20, 5.0

# plain numbers: Python's own are enumerations, slow to combine
_CMSG_CLOEXEC, _CTRUNC = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC)
_RIGHTS = (int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS))

log = structlog.get_logger(__name__)


class Connection:
    """Owns the socket, and the descriptors on it that no call has claimed, until `close`.

    It closes itself when the peer sends no more and its calls have ended, and says so to `ended`.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        groups: tuple[int, ...],
        desk: Desk,
        reader: Reader,
        *,
        monitor: bool,
        ended: Callable[["Connection"], None],
    ) -> None:
        self.peer = peer
        self.monitor = monitor
        self._sock = sock
        self._admission = desk.admission
        self._reader = reader
        self._ended = ended
        self._lines = LineSplitter(MAX_LINE)
        self._descriptors = Descriptors()
        self._outbox = Outbox(
            sock, desk.admission, broken=self.hang_up, slow=partial(self._drop, "slow")
        )
        self._runner = Runner(
            desk,
            peer,
            groups,
            self._outbox,
            monitor=monitor,
            hold=partial(reader.hold, self),
            freed=self._call_ended,
        )
        # lines that were read and not begun
        self._arrived: deque[bytes] = deque()
        # how much the last read brought
        self._length = 0
        # in the reader's queue
        self.queued = False
        # as many calls run as may
        self._full = False
        # nothing more is read; and what there is to say of that is said
        self._over = False
        self._finished = False
        self._dropped = False
        reader.sockets.add(sock, self)

    def close(self) -> None:
        """Close the socket, and the descriptors that came over it. No call may run any more."""
        self._descriptors.close()
        self._reader.sockets.remove(self._sock)
        self._sock.close()

    def hang_up(self) -> None:
        """The peer is gone: cancel what streams to or from it. May be called more than once."""
        self._outbox.close()
        self._runner.cancel_streams()

    def hurry(self, deadline: float) -> None:
        """The server is stopping: whatever is being sent has to be out by then (Trio's clock)."""
        self._outbox.hurry(deadline)

    def fail(self, error: Exception) -> None:
        """Have done with a connection that we have a fault in; the fault is its alone."""
        log.error("connection failed", exc_info=error)
        self._cut()

    def _drop(self, reason: str) -> None:
        """Have done with a peer that misbehaves."""
        if self._dropped:
            return
        self._dropped = True
        self._admission.dropped[reason] += 1
        log.warning("peer dropped", reason=reason, **self.peer._asdict())
        self._cut()

    def _cut(self) -> None:
        """Nothing more goes in or out, and what arrived is not begun."""
        self._arrived.clear()
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self.hang_up()
        self._read_no_more()

    # --- reading ------------------------------------------------------------------------------

    def hear(self) -> None:
        """Read once, unless as many calls run as may."""
        if self._over or self._is_full():
            return
        data = self._receive()
        if data:
            self._length = len(data)
            self._arrived.extend(self._lines.feed(data))
        if data == b"" or self._lines.overlong:
            self._read_no_more()

    def begin(self) -> Awaitable[None] | None:
        """Begin the next line, in the order they came in; see `first_step` for what is returned.

        After the last one: say what there is to say, and close.
        """
        if not self._arrived:
            if not self._over or self._finished:
                return None
            return first_step(self._finish())
        if self._is_full():
            return None
        answer = self._runner.begin(self._arrived.popleft(), self._descriptors.claim)
        if self._descriptors:
            self._descriptors.line_done()
            if not self._arrived:
                pending = self._lines.pending > 0
                self._descriptors.read_done(length=self._length, unfinished=pending)
        if self._arrived or self._over:
            self._reader.enqueue(self)
        return first_step(answer)

    def _is_full(self) -> bool:
        """Whether the connection has to wait until one of its calls ends."""
        if not self._full and not self._runner.has_room:
            self._full = True
            self._reader.sockets.hush(self._sock)
        return self._full

    def _call_ended(self) -> None:
        if self._finished:
            self._close_when_idle()
        elif self._full and self._runner.has_room:
            self._full = False
            if not self._over:
                self._reader.sockets.listen(self._sock)
            self._reader.enqueue(self)

    def _read_no_more(self) -> None:
        if not self._over:
            self._over = True
            self._reader.sockets.hush(self._sock)
        self._reader.enqueue(self)

    def _close_when_idle(self) -> None:
        if self._finished and not self._runner.in_flight:
            self.close()
            self._ended(self)

    def _receive(self) -> bytes | None:
        """One read; b"" at the end, None if there was nothing after all."""
        try:
            if self.monitor:
                # No method there takes a descriptor. Read so, the kernel drops them unseen, and
                # nobody can make us close(2), and wait for, a file of a file system of his own.
                return self._sock.recv(READ_SIZE)
            data, ancillary, flags, _ = self._sock.recvmsg(READ_SIZE, _ANCILLARY, _CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return b""
        for level, kind, payload in ancillary:
            if (level, kind) == _RIGHTS:
                whole = len(payload) // 4 * 4
                self._descriptors.receive(list(memoryview(payload[:whole]).cast("i")))
        if flags & _CTRUNC or len(self._descriptors) > MAX_UNCLAIMED:
            self._drop("descriptors")
            return b""
        return data

    async def _finish(self) -> None:
        """The peer sends no more, or nothing that is wanted: tell it what was wrong, and close."""
        try:
            await self._complain()
        finally:
            self._finished = True
            self._close_when_idle()

    async def _complain(self) -> None:
        if self._lines.overlong:
            error: AufsdError = InvalidRequest(f"a line of a request has at most {MAX_LINE} bytes")
        elif self._lines.pending:
            error = ParseError("the last line has no newline")
        else:
            return
        await self._outbox.send(dispatch.failure(None, error) + b"\n")
        if self._lines.overlong:
            self._admission.dropped["overlong"] += 1
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
            await self._linger()
            self.hang_up()

    async def _linger(self) -> None:
        left = _LINGER_BYTES
        with trio.move_on_after(_LINGER_SECONDS):
            while left > 0 and not self._outbox.closed:
                await trio.lowlevel.wait_readable(self._sock)
                with suppress(BlockingIOError, InterruptedError):
                    if not (data := self._sock.recv(READ_SIZE)):
                        return
                    left -= len(data)
