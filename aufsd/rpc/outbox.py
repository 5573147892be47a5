"""The sending half of a connection: whole frames, one after the other, without waiting."""

import socket
from collections import deque


class Outbox:
    """Sends on a socket that is not its own. `close` it when nobody is there to read."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # what is left of each frame that is not out
        self._frames: deque[memoryview] = deque()
        # bytes of them
        self.held = 0
        self.closed = False

    def __len__(self) -> int:
        """How many frames are not out."""
        return len(self._frames)

    def send(self, frame: bytes) -> None:
        """Send a frame, or what the socket takes of it; the rest waits for `flush`."""
        if self.closed:
            return
        sent = 0 if self._frames else self._send(frame)
        if sent < len(frame) and not self.closed:
            self._frames.append(memoryview(frame)[sent:])
            self.held += len(frame) - sent

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        while self._frames and not self.closed:
            sent = self._send(self._frames[0])
            self.held -= sent
            if sent < len(self._frames[0]):
                self._frames[0] = self._frames[0][sent:]
                return
            self._frames.popleft()

    def close(self) -> None:
        """Send no more; a frame that is half out stays so."""
        self.closed = True
        self._frames.clear()
        self.held = 0

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            # the peer is gone
            self.close()
            return len(data)
