"""One peer's socket: what comes in is cut into lines and handed to the runner, in order."""

import socket
from contextlib import suppress
from functools import partial

import structlog
import trio

from aufsd.peer import Peer
from aufsd.rpc import dispatch
from aufsd.rpc.descriptors import MAX_UNCLAIMED, Descriptors
from aufsd.rpc.outbox import Outbox
from aufsd.rpc.runner import Desk, Runner
from aufsd_client.errors import InvalidRequest, ParseError
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
        # a task that has run a call and waits to be the reader again
        self._standby = trio.lowlevel.ParkingLot()
        # nothing more is read
        self._over = False

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
        if self._over and self._outbox.closed:
            return
        self._over = True
        self._desk.admission.dropped[reason] += 1
        log.warning("peer dropped", reason=reason, **self._peer._asdict())
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self.hang_up()

    # --- reading ------------------------------------------------------------------------------

    async def _read(self, tasks: trio.Nursery) -> None:
        """Be the reader, of which there is one at any time.

        It runs the last line of what it read itself and has another task read on: a peer that
        waits for each answer is served by two tasks in turn, and not by a new one for each call.
        """
        while True:
            await self._runner.below_the_limit()
            await trio.lowlevel.wait_readable(self._sock)
            data = None if self._over else self._receive()
            if self._over or data == b"":
                break
            lines = self._lines.feed(data) if data else []
            for index, line in enumerate(lines):
                await self._runner.below_the_limit()
                if self._over:
                    break
                answer = self._runner.begin(line, self._descriptors.claim)
                self._descriptors.line_done()
                if index < len(lines) - 1 or self._lines.overlong:
                    tasks.start_soon(answer)
            if self._lines.overlong or self._over:
                break
            self._descriptors.read_done(length=len(data or b""), unfinished=self._lines.pending > 0)
            if lines:
                self._pass_on(tasks)
                await answer()
                if not await self._reads_again():
                    return
        await self._finish()
