"""One peer's socket: what comes in is cut into lines and handed to the runner, in order."""

import socket
from collections import deque
from contextlib import suppress
from functools import partial

import structlog
import trio

from aufsd.peer import Peer
from aufsd.rpc import dispatch
from aufsd.rpc.descriptors import MAX_UNCLAIMED, Descriptors
from aufsd.rpc.outbox import Outbox
from aufsd.rpc.runner import Desk, Runner
from aufsd.rpc.stepping import watched
from aufsd_client.errors import AufsdError, InvalidRequest, ParseError
from aufsd_client.wire import MAX_LINE, READ_SIZE, LineSplitter

# room for twice as many descriptors as may wait; the kernel closes what does not fit
_ANCILLARY = socket.CMSG_SPACE(2 * MAX_UNCLAIMED * 4)
# how much of an overlong line is read and thrown away, and for how long, so that a peer that
# writes before it reads comes to see why
_LINGER_BYTES, _LINGER_SECONDS = 16 << 20, 5.0

# after so many lines of one read the others have a turn
_YIELD = 32

# plain numbers: Python's own are enumerations, slow to combine
_CMSG_CLOEXEC, _CTRUNC = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC)
_RIGHTS = (int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS))

log = structlog.get_logger(__name__)


class Connection:
    """Owns the socket and the descriptors on it that no call has claimed. `serve` is its life."""

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        groups: tuple[int, ...],
        desk: Desk,
        *,
        monitor: bool,
    ) -> None:
        self._sock = sock
        self._peer = peer
        self._desk = desk
        self._monitor = monitor
        self._lines = LineSplitter(MAX_LINE)
        self._descriptors = Descriptors()
        self._outbox = Outbox(
            sock, desk.admission, broken=self.hang_up, slow=partial(self._drop, "slow")
        )
        self._runner = Runner(desk, peer, groups, self._outbox, monitor=monitor)
        # lines that were read and not begun
        self._arrived: deque[bytes] = deque()
        # a task whose call has waited and ended, to read when the next call waits
        self._spare = trio.lowlevel.ParkingLot()
        # how much the last read brought
        self._length = 0
        # nothing more is read; and there is no reader any more
        self._over = False
        self._ended = False
        self._dropped = False

    async def serve(self) -> None:
        """Serve the peer until it is gone and its calls have ended; closes the socket.

        Cancelled: running calls are cancelled too, and answered as far as that needs no waiting.
        """
        try:
            self._desk.hangups.watch(self._sock, self.hang_up)
            async with trio.open_nursery() as tasks:
                await self._read(tasks)
        finally:
            self._descriptors.close()
            self._desk.hangups.forget(self._sock)
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    def hang_up(self) -> None:
        """The peer is gone: cancel what streams to or from it. May be called more than once."""
        self._outbox.close()
        self._runner.cancel_streams()

    def hurry(self, deadline: float) -> None:
        """The server is stopping: whatever is being sent has to be out by then (Trio's clock)."""
        self._outbox.hurry(deadline)

    def _drop(self, reason: str) -> None:
        """Have done with a peer that misbehaves."""
        if self._dropped:
            return
        self._over = self._dropped = True
        self._desk.admission.dropped[reason] += 1
        log.warning("peer dropped", reason=reason, **self._peer._asdict())
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self.hang_up()

    # --- reading ------------------------------------------------------------------------------

    async def _read(self, tasks: trio.Nursery) -> None:
        """Be the reader, of which there is one at any time, until a call has to wait.

        Lines are begun in their order. A call that never waits is answered before the next line is
        looked at, which costs no task; when one does wait, another task reads on, which is the one
        of an earlier such call: a new one costs as much as a short call.
        """

        def read_on() -> None:
            if not self._spare.unpark():
                tasks.start_soon(self._read, tasks)

        while (line := await self._next_line()) is not None:
            answer = self._runner.begin(line, self._descriptors.claim)
            self._descriptors.line_done()
            if not self._arrived:
                pending = self._lines.pending > 0
                self._descriptors.read_done(length=self._length, unfinished=pending)
            if await watched(answer, read_on):
                if self._ended or self._spare:
                    return
                await self._spare.park()
                if self._ended:
                    return
        self._ended = True
        self._spare.unpark_all()
        await self._finish()

    async def _next_line(self) -> bytes | None:
        """The next line, once there may be another call; None if no more is to be read."""
        await self._runner.below_the_limit()
        while not self._arrived:
            if self._over or self._lines.overlong:
                return None
            await trio.lowlevel.wait_readable(self._sock)
            data = self._receive()
            if data == b"":
                return None
            if data:
                self._length = len(data)
                self._arrived.extend(self._lines.feed(data))
        if self._over:
            return None
        if len(self._arrived) % _YIELD == 0:
            # many short calls in one piece are no reason to keep other peers waiting
            await trio.lowlevel.checkpoint()
        return self._arrived.popleft()

    def _receive(self) -> bytes | None:
        """One read; b"" at the end, None if there was nothing after all."""
        try:
            if self._monitor:
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
        """The peer sends no more, or nothing that is wanted."""
        self._over = True
        if self._lines.overlong:
            error: AufsdError = InvalidRequest(f"a line of a request has at most {MAX_LINE} bytes")
        elif self._lines.pending:
            error = ParseError("the last line has no newline")
        else:
            return
        await self._outbox.send(dispatch.failure(None, error) + b"\n")
        if self._lines.overlong:
            self._desk.admission.dropped["overlong"] += 1
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
