"""Who is next: connections that have something to begin, users in turn. Pure."""

from collections import deque
from typing import Generic, Protocol, TypeVar


class Queued(Protocol):
    """A connection, as the queue sees it."""

    # it stands in the queue; the queue's own
    queued: bool

    @property
    def uid(self) -> int: ...


Q = TypeVar("Q", bound=Queued)


class ReadyQueue(Generic[Q]):
    """Each connection stands in it once. Users take turns, and the connections of each user do.

    So a user has the same share with one connection as another has with hundreds.
    """

    def __init__(self) -> None:
        self._users: deque[int] = deque()
        self._of: dict[int, deque[Q]] = {}

    def __bool__(self) -> bool:
        return bool(self._users)

    def push(self, connection: Q) -> None:
        """Put it at the end of its user's connections, unless it stands there."""
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
        """Take the next one out. IndexError if there is none."""
        uid = self._users.popleft()
        own = self._of[uid]
        connection = own.popleft()
        connection.queued = False
        if own:
            self._users.append(uid)
        else:
            del self._of[uid]
        return connection
