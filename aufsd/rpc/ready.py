"""The queue of connections that have a call to begin; round-robin over users. Pure."""

from collections import deque
from typing import Generic, Protocol, TypeVar


class Queued(Protocol):
    """A connection, as the queue sees it."""

    # whether it is in the queue; only the queue sets it
    queued: bool

    @property
    def uid(self) -> int: ...


Q = TypeVar("Q", bound=Queued)


class ReadyQueue(Generic[Q]):
    """Round-robin over users, and for each user over its connections. Each is in it once at most.

    So a user with one connection has the same share as a user with hundreds.
    """

    def __init__(self) -> None:
        self._users: deque[int] = deque()
        self._of: dict[int, deque[Q]] = {}

    def __bool__(self) -> bool:
        return bool(self._users)

    def push(self, connection: Q) -> None:
        """Put a connection behind its user's others, unless it is in the queue."""
        if connection.queued:
            return
        connection.queued = True
        own = self._of.get(connection.uid)
        if own is None:
            self._of[connection.uid] = deque((connection,))
            self._users.append(connection.uid)
        else:
            own.append(connection)

    def pop(self) -> Q:
        """Take out the next connection. IndexError if there is none."""
        uid = self._users.popleft()
        own = self._of[uid]
        connection = own.popleft()
        connection.queued = False
        if own:
            self._users.append(uid)
        else:
            del self._of[uid]
        return connection
