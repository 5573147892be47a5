"""The sending half of a connection: whole frames, one after the other, for who takes them."""

import socket
from collections.abc import Callable

import trio

from aufsd.rpc.admission import Admission


class Outbox:
    """Sends on a socket that is not its own. `close` it when nobody is there to read."""

    def __init__(
        self,
        sock: socket.socket,
        admission: Admission,
        *,
        broken: Callable[[], None],
        slow: Callable[[], None],
    ) -> None:
        self._sock = sock
        self._admission = admission
        self._broken = broken
        self._slow = slow
        self._lock = trio.Lock()
        self._scope: trio.CancelScope | None = None
        self.closed = False
        # bytes of frames that wait to go out
        self.held = 0

    def close(self) -> None:
        """Send no more; a frame that is half out stays so."""
        self.closed = True

    def hurry(self, deadline: float) -> None:
        """Whatever is being sent has to be out by then (Trio's clock)."""
        if self._scope is not None:
            self._scope.deadline = min(self._scope.deadline, deadline)

    def send_now(self, frame: bytes) -> int:
        """Send what goes out without waiting, if no other frame is half out; how much that was."""
        if self.closed or self.held:
            return 0
        try:
            return self._sock.send(frame)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._broken()
            return 0

    async def send(self, frame: bytes) -> None:
        """Send one frame, whole. A peer that does not take it in time is called slow."""
        await self.finish(frame, self.send_now(frame))

    async def finish(self, frame: bytes, sent: int) -> None:
        """Send what `send_now` left of a frame; nothing may be awaited between the two.

        Cancellation counts until the first byte is out, and not after it.
        """
        if sent == len(frame) or self.closed:
            return
        left = len(frame) - sent
        self.held += left
        try:
            if sent:
                self._lock.acquire_nowait()
            else:
                # another frame is half out, or nothing more goes in
                await self._lock.acquire()
            try:
                await self._send_rest(memoryview(frame)[sent:])
            finally:
                self._lock.release()
        finally:
            self.held -= left

    async def _send_rest(self, rest: memoryview) -> None:
        deadline = trio.current_time() + self._admission.settings.send_timeout
        deadline = min(deadline, self._admission.drain_until)
        with trio.CancelScope(shield=True, deadline=deadline) as scope:
            self._scope = scope
            while rest and not self.closed:
                await trio.lowlevel.wait_writable(self._sock)
                try:
                    rest = rest[self._sock.send(rest) :]
                except (BlockingIOError, InterruptedError):
                    continue
                except OSError:
                    self._broken()
        self._scope = None
        if scope.cancelled_caught:
            self._slow()
