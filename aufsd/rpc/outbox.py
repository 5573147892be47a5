"""The sending half of a connection. Frames go out whole, in order, and nothing here waits."""

import socket
from collections import deque


class Outbox:
    """Sends on a socket that is not its own. `close` it when nobody is there to read."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # the rest of each frame that was not sent whole
        self._frames: deque[memoryview] = deque()
        # their bytes
        self.unsent = 0
        self.closed = False

    def __len__(self) -> int:
        """How many frames are not sent whole."""
        return len(self._frames)

    def send(self, frame: bytes) -> None:
        """Send a frame, or what the socket takes of it; the rest waits for `flush`."""
        if self.closed:
            return
        sent = 0 if self._frames else self._send(frame)
        if sent < len(frame) and not self.closed:
            self._frames.append(memoryview(frame)[sent:])
            self.unsent += len(frame) - sent

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        while self._frames and not self.closed:
            sent = self._send(self._frames[0])
            self.unsent -= sent
            if sent < len(self._frames[0]):
                self._frames[0] = self._frames[0][sent:]
                return
            self._frames.popleft()

    def close(self) -> None:
        """Send no more; a frame that is half out stays so."""
        self.closed = True
        self._frames.clear()
        self.unsent = 0

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            # the peer is gone
            self.close()
            return len(data)
