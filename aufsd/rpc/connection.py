"""One peer: what it sends is read, bound and run, and answered as it finishes.

Whatever the peer does, its calls run to their end; only `diff` and `apply_diff`, whose other end is
the peer, are cancelled when it is gone.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import structlog
import trio

from aufsd.peer import Peer
from aufsd.rpc import dispatch, outcome
from aufsd.rpc.admission import Admission
from aufsd.rpc.calls import Answer, Call, Operations
from aufsd.rpc.descriptors import MAX_UNCLAIMED, Descriptors
from aufsd.rpc.dispatch import Bindings, Bound
from aufsd.rpc.hangups import Hangups
from aufsd.rpc.outbox import Outbox
from aufsd_client.errors import (
    AufsdError,
    InvalidRequest,
    Overloaded,
    ParseError,
    ShuttingDown,
)
from aufsd_client.wire import MAX_LINE, READ_SIZE, LineSplitter

# method, outcome ("ok", "cancelled" or an error's name), seconds
Observe = Callable[[str, str, float], None]

# room for twice as many descriptors as may wait; the kernel closes what does not fit
_ANCILLARY = socket.CMSG_SPACE(2 * MAX_UNCLAIMED * 4)
# what the answers of one batch may come to, in bytes, before the rest of it is refused
_MAX_BATCH_REPLY = 16 << 20
# how much of an overlong line is read and thrown away, and for how long, so that a peer that
# writes before it reads comes to see why
_LINGER_BYTES, _LINGER_SECONDS = 16 << 20, 5.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Desk:
    """What all connections of a server share."""

    driver: Operations
    bindings: Bindings
    admission: Admission
    observe: Observe
    hangups: Hangups


class Connection:
    """Owns the socket and what descriptors arrive on it. `serve` is its life."""

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
        self._admission = desk.admission
        self._monitor = monitor
        self._gate = partial(desk.admission.gate, peer, groups, monitor=monitor)
        self._permit = partial(desk.admission.permit, peer, groups)
        self._lines = LineSplitter(MAX_LINE)
        self._descriptors = Descriptors()
        self._in_flight = 0
        self._freed = trio.lowlevel.ParkingLot()
        self._gone = False
        self._dropped = False
        self._streams: set[trio.CancelScope] = set()
        self._outbox = Outbox(
            sock, desk.admission, broken=self.hang_up, slow=partial(self._drop, "slow")
        )

    async def serve(self) -> None:
        """Serve the peer until it is gone and its calls have ended; closes the socket.

        Cancelled: running calls are cancelled too, and answered as far as that needs no waiting.
        """
        try:
            self._desk.hangups.watch(self._sock, self.hang_up)
            async with trio.open_nursery() as calls:
                await self._read(calls)
        finally:
            self._descriptors.close()
            self._desk.hangups.forget(self._sock)
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    def hang_up(self) -> None:
        """The peer is gone: cancel what streams to or from it. May be called more than once."""
        self._gone = True
        self._outbox.close()
        for scope in self._streams:
            scope.cancel()

    def hurry(self, deadline: float) -> None:
        """The server is stopping: whatever is being sent has to be out by then (Trio's clock)."""
        self._outbox.hurry(deadline)

    def _drop(self, reason: str) -> None:
        """Have done with a peer that misbehaves."""
        if self._dropped:
            return
        self._dropped = True
        self._admission.dropped[reason] += 1
        log.warning("peer dropped", reason=reason, **self._peer._asdict())
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self.hang_up()

    # --- reading ------------------------------------------------------------------------------

    async def _read(self, calls: trio.Nursery) -> None:
        while True:
            await self._below_the_limit()
            await trio.lowlevel.wait_readable(self._sock)
            data = self._receive()
            if data is None:
                continue
            if not data or self._dropped:
                break
            for line in self._lines.feed(data):
                await self._below_the_limit()
                if self._dropped:
                    return
                self._start(line, calls)
                self._descriptors.line_done()
            if self._lines.overlong:
                await self._refuse_overlong()
                return
            self._descriptors.read_done(length=len(data), unfinished=self._lines.pending > 0)
        if self._lines.pending:
            error = ParseError("the last line has no newline")
            await self._outbox.send(dispatch.failure(None, error) + b"\n")

    def _receive(self) -> bytes | None:
        """One read; b"" at the end, None if there was nothing after all."""
        try:
            if self._monitor:
                # No method there takes a descriptor. Read so, the kernel drops them unseen, and
                # nobody can make us close(2), and wait for, a file of a file system of his own.
                return self._sock.recv(READ_SIZE)
            data, ancillary, flags, _ = self._sock.recvmsg(
                READ_SIZE, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return b""
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(payload) // 4 * 4
                self._descriptors.receive(list(memoryview(payload[:whole]).cast("i")))
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > MAX_UNCLAIMED:
            self._drop("descriptors")
            return b""
        return data

    async def _below_the_limit(self) -> None:
        while self._in_flight >= self._admission.settings.max_in_flight:
            await self._freed.park()

    async def _refuse_overlong(self) -> None:
        error = InvalidRequest(f"a line of a request has at most {MAX_LINE} bytes")
        await self._outbox.send(dispatch.failure(None, error) + b"\n")
        self._admission.dropped["overlong"] += 1
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        left = _LINGER_BYTES
        with trio.move_on_after(_LINGER_SECONDS):
            while left > 0 and not self._gone:
                await trio.lowlevel.wait_readable(self._sock)
                with suppress(BlockingIOError, InterruptedError):
                    if not (data := self._sock.recv(READ_SIZE)):
                        break
                    left -= len(data)
        self.hang_up()

    # --- calls --------------------------------------------------------------------------------

    def _start(self, line: bytes, calls: trio.Nursery) -> None:
        """Bind what a line asks for, descriptors claimed, and have it run."""
        self._in_flight += 1
        self._admission.begin(self._peer.uid)
        try:
            request = dispatch.decode(line)
        except ParseError as invalid:
            calls.start_soon(self._answer, self._refused(invalid))
            return
        if isinstance(request, list) and request:
            if len(request) > dispatch.MAX_BATCH:
                error = InvalidRequest(f"a batch has at most {dispatch.MAX_BATCH} calls")
                calls.start_soon(self._answer, self._refused(error))
                return
            fds = [self._claim(each) for each in request] if self._descriptors else []
            calls.start_soon(self._answer_batch, request, fds)
        else:
            calls.start_soon(self._answer, self._bind(request, self._claim(request)))

    def _claim(self, request: object) -> int | None:
        return self._descriptors.claim() if dispatch.claims(request) else None

    def _bind(self, request: object, fd: int | None) -> Bound:
        call = Call(self._desk.driver, self._peer, self._permit, fd)
        return dispatch.bind(request, self._desk.bindings, self._gate, call)

    def _refused(self, error: AufsdError) -> Bound:
        return Bound(self._gate, Call(self._desk.driver, self._peer, self._permit), error=error)

    async def _answer(self, bound: Bound) -> None:
        try:
            reply = await self._perform(bound)
            if reply is not None:
                await self._outbox.send(reply + b"\n")
        finally:
            self._end()

    async def _answer_batch(self, requests: list[object], fds: list[int | None]) -> None:
        """Run the calls of a batch in order, and answer them in one line."""
        replies: list[bytes] = []
        size = 0
        waiting = list(reversed(fds))
        try:
            for request in requests:
                bound = self._bind(request, waiting.pop() if waiting else None)
                if size > _MAX_BATCH_REPLY and bound.error is None:
                    bound.error = Overloaded("the answers of this batch are too long already")
                reply = await self._perform(bound)
                if reply is not None:
                    replies.append(reply)
                    size += len(reply)
                await trio.lowlevel.checkpoint()
            if replies:
                await self._outbox.send(b"[" + b",".join(replies) + b"]\n")
        finally:
            for fd in waiting:
                if fd is not None:
                    os.close(fd)
            self._end()

    def _end(self) -> None:
        self._in_flight -= 1
        self._admission.end(self._peer.uid)
        self._freed.unpark()

    async def _perform(self, bound: Bound) -> bytes | None:
        """Make the call; its reply, or None for a notification and for a peer that is gone."""
        began = time.perf_counter()
        error = bound.error
        reply, name = None, ""
        try:
            if error is None:
                answer = await self._run(bound)
                if answer is None:
                    name = "cancelled"
                else:
                    reply = dispatch.success(bound.id, answer)
        except AufsdError as raised:
            error = raised
        except trio.Cancelled:
            name = "cancelled"
            if not bound.silent:
                stopped = ShuttingDown("the daemon stopped before the call was done")
                self._outbox.send_now(dispatch.failure(bound.id, stopped) + b"\n")
            raise
        except (Exception, BaseExceptionGroup) as raised:
            error = outcome.translate(raised)
        finally:
            if bound.call.fd is not None:
                os.close(bound.call.fd)
            seconds = time.perf_counter() - began
            name = name or (type(error).__name__ if error else "ok")
            outcome.report(bound, name, error, seconds)
            self._desk.observe(bound.row.name if bound.row else "unknown", name, seconds)
        if bound.silent or self._gone:
            return None
        return dispatch.failure(bound.id, error) if error else reply

    async def _run(self, bound: Bound) -> Answer | None:
        """The bound call under this peer's limits; None if it was cut off with its peer."""
        assert bound.run is not None
        assert bound.row is not None
        self._admission.start(self._peer.uid, bound.row)
        try:
            if not bound.row.streams:
                return await bound.run()
            with trio.CancelScope() as scope:
                self._streams.add(scope)
                if self._gone:
                    scope.cancel()
                try:
                    return await bound.run()
                finally:
                    self._streams.remove(scope)
            return None
        finally:
            self._admission.stop(self._peer.uid, bound.row)
