"""One peer's socket. It is read into lines, and each line is handed to the runner, in order."""

import math
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import structlog
import trio

from aufsd.kernel.peer import Peer
from aufsd.rpc import dispatch, framing
from aufsd.rpc.descriptors import MAX_UNCLAIMED, Descriptors
from aufsd.rpc.framing import ReceiveBuffer, Unfinished
from aufsd.rpc.outbox import Outbox
from aufsd.rpc.poller import GONE, READABLE, WRITABLE
from aufsd.rpc.reader import Reader
from aufsd.rpc.runner import Runner, Shared
from aufsd.rpc.states import Event, State, after
from aufsd_client.errors import AufsdError, InvalidRequest, Overloaded, ParseError
from aufsd_client.wire import MAX_LINE, READ_SIZE

# requests to the monitor socket have about a hundred bytes, and everybody may open it
MONITOR_MAX_LINE = 32 << 10
_MONITOR_READ_SIZE = 16 << 10
# room for twice as many descriptors as may wait; the kernel closes what does not fit
_ANCILLARY = socket.CMSG_SPACE(2 * MAX_UNCLAIMED * 4)
# A refused peer may write all of its request before it reads why it was refused. So much of it is
# read and thrown away, for so long.
_LINGER_BYTES, _LINGER_SECONDS = 16 << 20, 5.0

# plain numbers: Python's own are enumerations, slow to combine
_CMSG_CLOEXEC, _CTRUNC = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC)
_RIGHTS = (int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS))

log = structlog.get_logger(__name__)


class Connection:
    """Owns the socket, and the descriptors on it that no call has claimed, until it is closed.

    When the peer sends no more and all calls have ended, it closes itself and calls `ended`.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        groups: tuple[int, ...],
        shared: Shared,
        reader: Reader,
        *,
        monitor: bool,
        ended: Callable[["Connection"], None],
    ) -> None:
        self.peer = peer
        self.uid = peer.uid
        self.monitor = monitor
        # the ready queue's own
        self.queued = False
        self.deadline = math.inf
        self._sock = sock
        self._shared = shared
        self._reader = reader
        self._ended = ended
        self._state = State.READING
        self._buffer = ReceiveBuffer(MONITOR_MAX_LINE if monitor else MAX_LINE)
        self._unfinished: Unfinished | None = None
        self._descriptors = Descriptors()
        self._outbox = Outbox(sock)
        self._runner = Runner(
            shared,
            peer,
            groups,
            self._outbox,
            monitor=monitor,
            after_tick=partial(reader.after_tick, self),
            start=reader.start,
            replied=self._on_reply,
            changed=self._update,
            failed=self.fail,
        )
        # bytes of the last read
        self._length = 0
        # bytes thrown away
        self._discarded = 0
        # bytes that the admission has counted, and what the poller watches for
        self._counted_bytes = 0
        self._watched = (True, False)
        reader.poller.add(sock, self)

    def close(self) -> None:
        """Close the socket, and the descriptors that came over it. No call may run any more."""
        self._state = State.CLOSED
        self._runner.abandon_batch()
        self._runner.close_outbox()
        self._descriptors.close()
        self._reader.set_deadline(self, math.inf)
        self._reader.poller.remove(self._sock)
        self._sock.close()
        self._shared.admission.count_bytes(self.uid, -self._counted_bytes, monitor=self.monitor)
        self._counted_bytes = 0

    # --- what the reader calls ----------------------------------------------------------------

    def on_ready(self, events: int) -> None:
        """Read once, send more, or note that the peer is gone, as the socket is ready for it."""
        if events & GONE and self.monitor:
            # no call of the monitor socket changes anything, and nobody takes the answers
            self._abort()
        elif events & GONE:
            # the calls that it has sent are carried out all the same
            self._runner.close_outbox()
            self._update()
        elif events & WRITABLE:
            self._flush()
        if events & READABLE:
            self._read()

    def step(self) -> None:
        """Begin the next request of the batch, or the next line."""
        batch = self._runner.batch
        if batch is not None and batch.is_ready:
            self._runner.step_batch()
        elif self._has_more() and self._has_room():
            self._next_line()
        if not self._is_idle():
            self._update()

    def expire(self) -> None:
        """The deadline has passed: the peer did not take an answer, or was refused."""
        if self._state is State.REFUSED and not self._outbox:
            self._move(Event.DONE)
            self._update()
        else:
            self._drop("slow")

    def fail(self, error: Exception) -> None:
        """Drop this connection, and no other, after a fault of aufsd."""
        log.error("connection failed", exc_info=error)
        self._abort()

    # --- states -------------------------------------------------------------------------------

    def _move(self, event: Event) -> None:
        self._state = after(self._state, event)

    def _is(self, state: State) -> bool:
        # with `is` in the caller, mypy would think that `_move` changes nothing
        return self._state is state

    def _update(self) -> None:
        """Move to the state that fits what has changed, and watch the socket accordingly."""
        if self._state is State.CLOSED:
            return
        self._count_memory()
        batch, room = self._runner.batch, self._has_room()
        if self._state is State.READING and not room:
            self._move(Event.FULL)
        elif self._state is State.PAUSED and room:
            self._move(Event.ROOM)
        if (batch is not None and batch.is_ready) or (room and self._has_more()):
            self._reader.enqueue(self)
        if not self._runner.in_flight:
            if self._state is State.REFUSED:
                # the peer sees the end of the answers, and may write for a while longer
                with suppress(OSError):
                    self._sock.shutdown(socket.SHUT_WR)
            self._move(Event.IDLE)
        if self._is(State.CLOSED):
            self.close()
            self._ended(self)
            return
        self._watch()

    def _is_idle(self) -> bool:
        """Whether `_update` would change nothing, as after most calls."""
        return (
            self._state is State.READING
            and not self._counted_bytes
            and not self._buffer
            and self._runner.is_idle
        )

    def _has_more(self) -> bool:
        """Whether there may be another line, or the end of the input."""
        if self._runner.is_starting:
            return False
        state = self._state
        return state is State.ENDED or (state is State.READING and self._buffer.unsearched)

    def _on_reply(self) -> None:
        # after most answers `_update` would change nothing
        if self._state is not State.READING or self._outbox:
            self._update()

    def _has_room(self) -> bool:
        """Whether another line may be begun. A connection carries out one batch at a time."""
        runner = self._runner
        return runner.has_room and (runner.batch is None or not self._buffer.begins_batch())

    def _watch(self) -> None:
        """Tell the poller what to watch for, and the reader the deadline."""
        blocked = bool(self._outbox)
        wanted = (self._state in (State.READING, State.REFUSED), blocked)
        if wanted != self._watched:
            self._watched = wanted
            self._reader.poller.watch(self._sock, read=wanted[0], write=blocked)
        if self._state is State.REFUSED:
            return
        if blocked and self.deadline == math.inf:
            timeout = self._shared.admission.settings.send_timeout
            self._reader.set_deadline(self, trio.current_time() + timeout)
        elif not blocked and self.deadline != math.inf:
            self._reader.set_deadline(self, math.inf)

    def _count_memory(self) -> None:
        """Count the bytes in memory. A connection that makes them too many is told, and dropped."""
        memory = len(self._buffer) + self._runner.memory
        if memory != self._counted_bytes:
            change, self._counted_bytes = memory - self._counted_bytes, memory
            try:
                self._shared.admission.count_bytes(self.uid, change, monitor=self.monitor)
            except Overloaded as error:
                if self._state is not State.DROPPED:
                    self._outbox.send(dispatch.failure(None, error) + b"\n")
                    self._drop("memory")

    def _refuse(self, error: AufsdError, reason: str) -> None:
        """Answer with an error, and carry out nothing more of what the peer sends."""
        self._shared.admission.dropped[reason] += 1
        self._shared.log.dropped(self.peer, reason)
        self._buffer.clear()
        self._descriptors.close()
        self._runner.refuse(error)
        self._move(Event.REFUSE)
        self._reader.set_deadline(self, trio.current_time() + _LINGER_SECONDS)

    def _drop(self, reason: str) -> None:
        """Drop a peer that misbehaves."""
        if self._state not in (State.DROPPED, State.CLOSED):
            self._shared.admission.dropped[reason] += 1
            self._shared.log.dropped(self.peer, reason)
            self._abort()

    def _abort(self) -> None:
        """Shut the socket down, and begin nothing of what has arrived."""
        self._move(Event.DROP)
        self._buffer.clear()
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._runner.abandon_batch()
        self._runner.close_outbox()
        self._update()

    # --- the socket ---------------------------------------------------------------------------

    def _flush(self) -> None:
        before = len(self._outbox)
        self._runner.flush()
        if len(self._outbox) < before:
            # the next frame gets a deadline of its own
            self._reader.set_deadline(self, math.inf)
        self._update()

    def _read(self) -> None:
        """Read once, if anything is to be read."""
        if self._state is State.REFUSED:
            self._discard()
        elif self._state is State.READING and not self._buffer.unsearched:
            data = self._receive()
            if data:
                self._length = len(data)
                self._buffer.feed(data)
            elif data is not None:
                self._move(Event.END)
            self._reader.enqueue(self)

    def _receive(self) -> bytes | None:
        """One read. b"" at the end; None if there was nothing to read."""
        try:
            if self.monitor:
                # No method of the monitor socket takes a descriptor. recv(2) has the kernel drop
                # them. To receive and close(2) them could block: the file may be of a file system
                # that the peer itself serves.
                return self._sock.recv(_MONITOR_READ_SIZE)
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
            return None
        return data

    def _discard(self) -> None:
        try:
            data = self._sock.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        self._discarded += len(data)
        if not data or self._discarded > _LINGER_BYTES:
            self._move(Event.DONE)
            self._update()

    def _next_line(self) -> None:
        """Begin the next whole line. After the last one, report a rest without a newline."""
        try:
            line = self._buffer.next_line()
        except InvalidRequest as error:
            self._refuse(error, "overlong")
            return
        if line is not None:
            self._begin(line)
            if self._descriptors:
                self._descriptors.line_done()
                if not self._buffer.has_line():
                    unfinished = len(self._buffer) > 0
                    self._descriptors.read_done(length=self._length, unfinished=unfinished)
        elif self._state is State.ENDED:
            if len(self._buffer):
                self._buffer.clear()
                self._runner.refuse(ParseError("the last line has no newline"))
            self._move(Event.DONE)

    def _begin(self, line: bytes) -> None:
        try:
            if self._unfinished is not None and self._is_inside(line):
                return
            if line[:1] != b"{" and line.lstrip()[:1] == b"[":
                elements = dispatch.split_batch(line)
                self._runner.begin_batch(elements, self._claim_all(elements), len(line))
                return
            message = dispatch.decode(line)
        except ParseError as error:
            self._explain(line, error)
        except InvalidRequest as error:
            self._runner.refuse(error)
        else:
            fd = None
            if self._descriptors and dispatch.claims(message):
                fd = self._descriptors.claim()
            self._runner.begin(message, fd, len(line))

    def _claim_all(self, elements: list[dispatch.Element]) -> list[int | None]:
        """The descriptors of a batch. All are claimed before the first request is begun."""
        if not self._descriptors:
            return []
        claimed: list[int | None] = []
        for element in elements:
            with suppress(ParseError):
                if dispatch.claims(dispatch.decode(element)):
                    claimed.append(self._descriptors.claim())
                    continue
            claimed.append(None)
        return claimed

    # --- lines that are no JSON ---------------------------------------------------------------

    def _explain(self, line: bytes, error: ParseError) -> None:
        if framing.is_http(line):
            self._refuse(framing.HTTP, "http")
            return
        if Unfinished.begins_with(line):
            self._unfinished = Unfinished(line)
        self._runner.refuse(framing.explain(line, error), framing.salvaged(line))

    def _is_inside(self, line: bytes) -> bool:
        """Whether a line belongs to a value that began on an earlier one, and is answered if so."""
        assert self._unfinished is not None
        try:
            inside = self._unfinished.takes(line)
        except ParseError as error:
            self._refuse(error, "overlong")
            return True
        if not inside or self._unfinished.ended:
            self._unfinished = None
        if inside:
            with suppress(ParseError):
                message = dispatch.decode(line)
                if isinstance(message, dict) and "id" in message:
                    self._runner.refuse(framing.INSIDE, message)
        return inside
