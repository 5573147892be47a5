"""The calls of one peer: begun in the order of their lines, run concurrently, answered as they end.

A call runs to its end even if the peer goes away. The exceptions are `diff` and `apply_diff`, which
stream to or from the peer, and `usage`: they are cancelled.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import trio

from aufsd.driver import Driver
from aufsd.kernel.peer import Peer
from aufsd.rpc import descriptors, dispatch
from aufsd.rpc.access_log import AccessLog
from aufsd.rpc.admission import Admission
from aufsd.rpc.batch import Batch
from aufsd.rpc.calls import Answer, Call
from aufsd.rpc.dispatch import Methods, Request
from aufsd.rpc.faults import is_cancellation, translate
from aufsd.rpc.outbox import Outbox
from aufsd_client.errors import AufsdError, Overloaded, ParseError, ShuttingDown

# method, outcome ("ok", "cancelled" or an error's name), seconds
Observe = Callable[[str, str, float], None]

# bytes of answers of one batch, after which the rest of it is refused; by whether it is the monitor
# socket
_MAX_BATCH_REPLY = {False: 16 << 20, True: 1 << 20}
# bytes of answers that the peer has not read; beyond it none of its lines is begun
_MAX_UNSENT = 64 << 10


@dataclass(frozen=True, slots=True)
class Shared:
    """What all connections of a server share."""

    driver: Driver
    methods: Methods
    admission: Admission
    observe: Observe
    log: AccessLog


class Runner:
    """Owns the descriptors that its calls have claimed, until the calls end.

    Callbacks: `after_tick` is given a reply to make at the end of the tick, and `replied` is called
    after it. `start` is given a call that waits; `changed` is called when that has ended, and
    `failed` for a fault of aufsd.
    """

    def __init__(
        self,
        shared: Shared,
        peer: Peer,
        groups: tuple[int, ...],
        outbox: Outbox,
        *,
        monitor: bool,
        after_tick: Callable[[Callable[[], None]], None],
        start: Callable[..., None],
        replied: Callable[[], None],
        changed: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._shared = shared
        self._peer = peer
        self._admission = shared.admission
        self._gate = partial(shared.admission.gate, peer, groups, monitor=monitor)
        self._permit = partial(shared.admission.permit, peer, groups)
        # shared by all requests without a descriptor
        self._plain = Call(shared.driver, peer, self._permit)
        self._outbox = outbox
        self._batch_limit = _MAX_BATCH_REPLY[monitor]
        self._after_tick = after_tick
        self._start = start
        self._replied = replied
        self._changed = changed
        self._failed = failed
        self._streams: set[trio.CancelScope] = set()
        # calls that wait, and those that are answered at the end of the tick
        self._waiting = 0
        self._pending = 0
        # A call has a task that Trio has not run yet. No other call is begun until then, because
        # Trio runs new tasks in any order, and the calls of a connection begin in theirs.
        self.is_starting = False
        # bytes of the lines of calls that wait
        self._waiting_bytes = 0
        self.batch: Batch | None = None

    @property
    def in_flight(self) -> int:
        """Calls without an answer, and answers that are not sent whole."""
        return self._waiting + self._pending + len(self._outbox) + (self.batch is not None)

    @property
    def is_idle(self) -> bool:
        """Whether no call waits, and no answer for its peer."""
        return not self._waiting and not self._outbox.unsent and self.batch is None

    @property
    def has_room(self) -> bool:
        """Whether another call may be begun."""
        limit = self._admission.settings.max_in_flight
        return self.in_flight < limit and self._outbox.unsent <= _MAX_UNSENT

    @property
    def memory(self) -> int:
        """Bytes in memory for what is in flight."""
        batch = self.batch.memory if self.batch is not None else 0
        return self._waiting_bytes + self._outbox.unsent + batch

    def cancel_streams(self) -> None:
        """Cancel the calls that end with their peer."""
        for scope in self._streams:
            scope.cancel()

    # --- requests -----------------------------------------------------------------------------

    def begin(self, message: object, fd: int | None, size: int) -> None:
        """Carry out a request. It came in a line of `size` bytes, and has claimed `fd`."""
        self._begin(message, fd, size, None)

    def refuse(self, error: AufsdError, message: object = None) -> None:
        """Answer a line with an error. `message` is the value in it, and has the id."""
        request = dispatch.refused(error, self._gate, self._plain, message)
        self._reply_later(request, None, 0.0)

    def begin_batch(
        self, elements: Sequence[msgspec.Raw], fds: Sequence[int | None], size: int
    ) -> None:
        """Have the requests of a batch carried out by `step_batch`, one at a time."""
        self.batch = Batch(elements, fds, size, self._batch_limit)
        self._admission.begin(self._peer.uid)

    def step_batch(self) -> None:
        """Carry out the next request of the batch. The batch has to be ready."""
        batch = self.batch
        assert batch is not None
        element, fd = batch.take()
        try:
            message = dispatch.decode(element)
        except ParseError as error:
            request = dispatch.refused(error, self._gate, self._plain)
        else:
            if not batch.is_full:
                self._begin(message, fd, 0, batch)
                return
            request = dispatch.refused(
                Overloaded("the answers of this batch are too long already"),
                self._gate,
                self._plain,
                message,
            )
        if fd is not None:
            descriptors.close(fd)
        self._reply_later(request, batch, 0.0)

    def _begin(self, message: object, fd: int | None, size: int, batch: Batch | None) -> None:
        call = self._plain
        if fd is not None:
            call = Call(self._shared.driver, self._peer, self._permit, fd)
        began = time.perf_counter()
        # `status` and `metrics` count themselves
        self._admission.in_flight += 1
        request = dispatch.dispatch(message, self._shared.methods, self._gate, call)
        self._admission.in_flight -= 1
        if request.waiting is not None and request.row is not None and request.row.streams:
            try:
                self._admission.begin_archive(self._peer.uid)
            except Overloaded as error:
                request.waiting.close()
                request.waiting = None
                request.failed(error)
        if request.waiting is not None:
            if batch is not None:
                batch.waiting = True
            self.is_starting = True
            self._waiting += 1
            self._waiting_bytes += size
            self._admission.begin(self._peer.uid)
            self._start(self._run, request, batch, began, size)
            return
        if fd is not None:
            descriptors.close(fd)
        self._reply_later(request, batch, time.perf_counter() - began)

    # --- calls that wait ----------------------------------------------------------------------

    async def _run(self, request: Request, batch: Batch | None, began: float, size: int) -> None:
        """The task of a call that waits."""
        try:
            await self._finish(request, began)
            self._reply(request, batch, time.perf_counter() - began)
        except Exception as error:
            self._failed(error)
        finally:
            self._waiting -= 1
            self._waiting_bytes -= size
            self._admission.end(self._peer.uid)
            self._changed()

    async def _finish(self, request: Request, began: float) -> None:
        """Await the call. If it is cancelled, the peer is told so, unless that would block."""
        assert request.waiting is not None
        assert request.row is not None
        try:
            self.is_starting = False
            self._changed()
            # There is no await before this. So the call runs now, up to its own first wait.
            if request.row.cancel_with_peer:
                await self._await_while_connected(request)
            else:
                request.answered(await request.waiting)
        except BaseException as raised:
            if not is_cancellation(raised):
                request.failed(translate(raised))
                return
            request.failed(ShuttingDown("the daemon stopped before the call was done"))
            if request.reply is not None:
                self._outbox.send(request.encode() + b"\n")
            request.cancelled()
            self._reply(request, None, time.perf_counter() - began)
            raise
        finally:
            if request.call.fd is not None:
                descriptors.close(request.call.fd)
            if request.row.streams:
                self._admission.end_archive(self._peer.uid)

    async def _await_while_connected(self, request: Request) -> None:
        """Await a call that is cancelled when its peer goes away."""
        assert request.waiting is not None
        answer: Answer | None = None
        with trio.CancelScope() as scope:
            self._streams.add(scope)
            if self._outbox.closed:
                scope.cancel()
            try:
                answer = await request.waiting
            finally:
                self._streams.remove(scope)
        if answer is None:
            request.cancelled()
        else:
            request.answered(answer)

    # --- answers ------------------------------------------------------------------------------

    def _reply_later(self, request: Request, batch: Batch | None, seconds: float) -> None:
        self._pending += 1
        self._after_tick(partial(self._reply_pending, request, batch, seconds))

    def _reply_pending(self, request: Request, batch: Batch | None, seconds: float) -> None:
        self._pending -= 1
        self._reply(request, batch, seconds)
        self._replied()

    def _reply(self, request: Request, batch: Batch | None, seconds: float) -> None:
        """Send the answer of a call that has ended; log and count the call."""
        reply = None
        if request.reply is not None and not self._outbox.closed:
            reply = request.encode()
        if batch is not None:
            batch.end(reply)
            if batch.is_over:
                self._end_batch(batch)
        elif reply is not None:
            self.send(reply + b"\n")
        # the answer first, so that the peer does not wait for the log
        self._shared.log.call(self._peer, request, seconds)
        self._shared.observe(
            request.row.name if request.row else "unknown", request.outcome, seconds
        )

    def _end_batch(self, batch: Batch) -> None:
        self.batch = None
        self._admission.end(self._peer.uid)
        frame = batch.frame()
        if frame is not None:
            self.send(frame)

    def send(self, frame: bytes) -> None:
        """Send an answer. It counts as in flight until it is sent whole."""
        before = len(self._outbox)
        self._outbox.send(frame)
        self._count(len(self._outbox) - before)

    def flush(self) -> None:
        """Send more of the answers; the socket is ready for it."""
        before = len(self._outbox)
        self._outbox.flush()
        self._count(len(self._outbox) - before)

    def close_outbox(self) -> None:
        """Drop the answers: the peer is gone. Cancel the calls that end with it."""
        before = len(self._outbox)
        self._outbox.close()
        self._count(-before)
        self.cancel_streams()

    def abandon_batch(self) -> None:
        """Begin no more requests of the batch."""
        if self.batch is not None:
            self.batch.close()
            if self.batch.is_over:
                self._end_batch(self.batch)

    def _count(self, change: int) -> None:
        for _ in range(change):
            self._admission.begin(self._peer.uid)
        for _ in range(-change):
            self._admission.end(self._peer.uid)
