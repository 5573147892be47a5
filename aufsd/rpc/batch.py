"""A batch in progress: its requests are carried out in order and answered in one line."""

from collections.abc import Sequence

import msgspec

from aufsd.rpc import descriptors

# bytes of a Raw and its place in the list
_OBJECT = 100


class Batch:
    """Owns the claimed descriptors of the requests that were not taken out yet."""

    def __init__(
        self, elements: Sequence[msgspec.Raw], fds: Sequence[int | None], size: int, limit: int
    ) -> None:
        self._elements = elements
        self._fds = fds
        self._limit = limit
        self._next = 0
        self._ended = 0
        self._replies: list[bytes] = []
        # bytes in memory: the line, one object per element, the replies
        self.memory = size + _OBJECT * len(elements)
        # of the replies
        self._size = 0
        # the last request taken out waits; the next one may not be begun
        self.waiting = False

    @property
    def is_ready(self) -> bool:
        """Whether there is a request that can be begun now."""
        return not self.waiting and self._next < len(self._elements)

    @property
    def is_over(self) -> bool:
        """Whether every request has ended."""
        return self._ended == len(self._elements)

    @property
    def is_full(self) -> bool:
        """Whether the replies are so long that the rest of the requests is refused."""
        return self._size > self._limit

    def take(self) -> tuple[msgspec.Raw, int | None]:
        """The next request and its descriptor, which is the caller's."""
        at, self._next = self._next, self._next + 1
        return self._elements[at], self._fds[at] if self._fds else None

    def end(self, reply: bytes | None) -> None:
        """A request that was taken out has ended. `reply` is None for a notification."""
        self._ended += 1
        self.waiting = False
        if reply is not None:
            self._replies.append(reply)
            self._size += len(reply)
            self.memory += len(reply)

    def frame(self) -> bytes | None:
        """All replies as one line; None if there are none."""
        return b"[" + b",".join(self._replies) + b"]\n" if self._replies else None

    def close(self) -> None:
        """Close the descriptors of requests that are not begun."""
        for fd in self._fds[self._next :]:
            if fd is not None:
                descriptors.close(fd)
        self._elements = self._elements[: self._next]
