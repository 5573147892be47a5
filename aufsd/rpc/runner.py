"""The calls of one peer: bound in the order they came in, run side by side, answered as they end.

Whatever the peer does, its calls run to their end; only `diff` and `apply_diff`, whose other end is
the peer, are cancelled when it is gone.
"""

import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import trio

from aufsd.kernel.peer import Peer
from aufsd.rpc import dispatch, outcome
from aufsd.rpc.admission import Admission
from aufsd.rpc.calls import Answer, Call, Operations
from aufsd.rpc.dispatch import Bindings, Bound
from aufsd.rpc.outbox import Outbox
from aufsd_client.errors import AufsdError, InvalidRequest, Overloaded, ParseError, ShuttingDown

# method, outcome ("ok", "cancelled" or an error's name), seconds
Observe = Callable[[str, str, float], None]
# The oldest descriptor that came and is not claimed; None if there is none
Claim = Callable[[], int | None]
# Runs what a line asks for, and answers it
Answering = Coroutine[Any, Any, None]

# what the answers of one batch may come to, in bytes, before the rest of it is refused
_MAX_BATCH_REPLY = 16 << 20
# while more than this waits for a peer that does not read its answers, none of its lines is begun:
# everybody may open the monitor socket two thousand times
_MAX_HELD = 64 << 10


@dataclass(frozen=True, slots=True)
class Desk:
    """What all connections of a server share."""

    driver: Operations
    bindings: Bindings
    admission: Admission
    observe: Observe


class _Done(NamedTuple):
    """A call that has ended. No reply: it was a notification, or the peer is gone."""

    reply: bytes | None
    name: str
    error: AufsdError | None
    seconds: float


class Runner:
    """Owns the descriptors that its calls claimed, until they end."""

    def __init__(
        self,
        desk: Desk,
        peer: Peer,
        groups: tuple[int, ...],
        outbox: Outbox,
        *,
        monitor: bool,
        hold: Callable[[Answering], None],
        freed: Callable[[], None],
    ) -> None:
        self._desk = desk
        self._peer = peer
        self._admission = desk.admission
        self._gate = partial(desk.admission.gate, peer, groups, monitor=monitor)
        self._permit = partial(desk.admission.permit, peer, groups)
        # the call of every request that brings no descriptor
        self._plain = Call(desk.driver, peer, self._permit)
        self._outbox = outbox
        self._streams: set[trio.CancelScope] = set()
        self._unwritten = desk.driver.turn.unwritten
        self._hold = hold
        self._freed = freed
        self.in_flight = 0

    @property
    def has_room(self) -> bool:
        """Whether another call may be begun. When one ends, `freed` is called."""
        limit = self._admission.settings.max_in_flight
        return self.in_flight < limit and self._outbox.held <= _MAX_HELD

    def cancel_streams(self) -> None:
        """The outbox is closed: cancel what streams to or from the peer."""
        for scope in self._streams:
            scope.cancel()

    def begin(self, line: bytes, claim: Claim) -> Answering:
        """Bind what a line asks for, descriptors claimed.

        It is in flight until what this returns, which has to be awaited, has ended.
        """
        answering = self._answering(line, claim)
        self.in_flight += 1
        self._admission.begin(self._peer.uid)
        return answering

    def _answering(self, line: bytes, claim: Claim) -> Answering:
        try:
            request = dispatch.decode(line)
        except ParseError as invalid:
            return self._answer(self._refused(invalid))
        if not isinstance(request, list) or not request:
            fd = claim() if dispatch.claims(request) else None
            return self._answer(self._bind(request, fd))
        if len(request) > dispatch.MAX_BATCH:
            error = InvalidRequest(f"a batch has at most {dispatch.MAX_BATCH} calls")
            return self._answer(self._refused(error))
        fds = [claim() if dispatch.claims(each) else None for each in request]
        return self._answer_batch(request, fds)

    def _bind(self, request: object, fd: int | None) -> Bound:
        call = self._plain
        if fd is not None:
            call = Call(self._desk.driver, self._peer, self._permit, fd)
        return dispatch.bind(request, self._desk.bindings, self._gate, call)

    def _refused(self, error: AufsdError) -> Bound:
        return Bound(self._gate, self._plain, error=error)

    def _end(self) -> None:
        self.in_flight -= 1
        self._admission.end(self._peer.uid)
        self._freed()

    # --- answers ------------------------------------------------------------------------------

    async def _answer(self, bound: Bound) -> None:
        try:
            done = await self._perform(bound)
        except BaseException:
            self._end()
            raise
        if self._unwritten:
            self._hold(self._reply(bound, done))
        else:
            await self._reply(bound, done)

    async def _reply(self, bound: Bound, done: _Done) -> None:
        try:
            if done.reply is None:
                self._report(bound, done)
                return
            frame = done.reply + b"\n"
            sent = self._outbox.send_now(frame)
            # the peer has its answer before the log has its line
            self._report(bound, done)
            await self._outbox.finish(frame, sent)
        finally:
            self._end()

    async def _answer_batch(self, requests: list[object], fds: list[int | None]) -> None:
        """Run the calls of a batch in order, and answer them in one line."""
        replies: list[bytes] = []
        size = 0
        waiting = list(reversed(fds))
        try:
            for request in requests:
                bound = self._bind(request, waiting.pop())
                if size > _MAX_BATCH_REPLY and bound.error is None:
                    bound.error = Overloaded("the answers of this batch are too long already")
                done = await self._perform(bound)
                self._report(bound, done)
                if done.reply is not None:
                    replies.append(done.reply)
                    size += len(done.reply)
                await trio.lowlevel.checkpoint()
            if replies:
                await self._outbox.send(b"[" + b",".join(replies) + b"]\n")
        finally:
            for fd in waiting:
                if fd is not None:
                    os.close(fd)
            self._end()

    def _report(self, bound: Bound, done: _Done) -> None:
        outcome.report(bound, done.name, done.error, done.seconds)
        self._desk.observe(bound.row.name if bound.row else "unknown", done.name, done.seconds)

    # --- calls --------------------------------------------------------------------------------

    async def _perform(self, bound: Bound) -> _Done:
        """Make the call. Cancelled: it is reported, and the peer told if that needs no waiting."""
        began = time.perf_counter()
        error, reply, name = bound.error, None, ""
        try:
            if error is None:
                assert bound.run is not None
                assert bound.row is not None
                self._admission.start(self._peer.uid, bound.row)
                try:
                    if bound.row.streams:
                        answer = await self._stream(bound.run)
                    else:
                        answer = await bound.run()
                finally:
                    self._admission.stop(self._peer.uid, bound.row)
                if answer is None:
                    name = "cancelled"
                else:
                    reply = dispatch.success(bound.id, answer)
        except BaseException as raised:
            if outcome.is_cancellation(raised):
                stopped = ShuttingDown("the daemon stopped before the call was done")
                if not bound.silent:
                    self._outbox.send_now(dispatch.failure(bound.id, stopped) + b"\n")
                self._report(bound, _Done(None, "cancelled", None, time.perf_counter() - began))
                raise
            error = outcome.translate(raised)
        finally:
            if bound.call.fd is not None:
                os.close(bound.call.fd)
        if error is not None:
            name, reply = type(error).__name__, dispatch.failure(bound.id, error)
        if bound.silent or self._outbox.closed:
            reply = None
        return _Done(reply, name or "ok", error, time.perf_counter() - began)

    async def _stream(self, run: Callable[[], Awaitable[Answer]]) -> Answer | None:
        """A call that streams to or from its peer; None if it was cut off with it."""
        with trio.CancelScope() as scope:
            self._streams.add(scope)
            if self._outbox.closed:
                scope.cancel()
            try:
                return await run()
            finally:
                self._streams.remove(scope)
        return None
