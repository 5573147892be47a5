"""Who is let in, what they may ask, and how much at a time. Pure: it counts and refuses.

Limits hold for each socket or each user by itself, so that whoever may open the monitor socket,
which is everybody, cannot keep others off the control socket.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from aufsd.kernel.peer import Peer
from aufsd.rpc.calls import Kind, Method
from aufsd_client.errors import Overloaded, PermissionDenied, ShuttingDown

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Allow:
    """Users and groups that may call a kind of method; root may always."""

    uids: tuple[int, ...] = ()
    gids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits of the edge; seconds and counts. 0 is no limit where "per user" is said."""

    # for each of the two sockets
    max_connections: int = 2000
    # of one connection; then it is not read (api.md section 1)
    max_in_flight: int = 64
    # per user, over all its connections; beyond: -32001
    max_connections_per_user: int = 0
    max_calls_per_user: int = 0
    max_archives_per_user: int = 0
    # running calls may take so long after the stop was asked for
    drain_timeout: float = 10.0
    # a peer that does not take a reply for so long is dropped
    send_timeout: float = 30.0
    # a kind that is not named is open to everybody who can open the socket
    allow: Mapping[Kind, Allow] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the edge has seen since its start, and holds now."""

    connections: int
    accepted: int
    refused: int
    in_flight: int
    # why peers were dropped: "overlong", "descriptors", "slow"
    dropped: Mapping[str, int]


@dataclass(slots=True)
class Admission:
    """The counts of one server. `settings` may be replaced while it runs."""

    settings: Settings
    # called when the last call has ended while draining
    on_idle: Callable[[], None]
    draining: bool = False
    # when the drain is over, by the clock of who drains
    drain_until: float = math.inf
    in_flight: int = 0
    accepted: int = 0
    refused: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    # (monitor, uid) -> connections; uid -> calls, archives
    _connections: Counter[tuple[bool, int]] = field(default_factory=Counter)
    _calls: Counter[int] = field(default_factory=Counter)
    _archives: Counter[int] = field(default_factory=Counter)

    def statistics(self) -> Statistics:
        """A snapshot."""
        return Statistics(
            connections=self._connections.total(),
            accepted=self.accepted,
            refused=self.refused,
            in_flight=self.in_flight,
            dropped=dict(self.dropped),
        )

    # --- connections --------------------------------------------------------------------------

    def admit(self, uid: int, *, monitor: bool) -> None:
        """Count one more, or Overloaded."""
        try:
            self._room(uid, monitor=monitor)
        except Overloaded:
            self.refused += 1
            raise
        self.accepted += 1
        self._connections[monitor, uid] += 1

    def leave(self, uid: int, *, monitor: bool) -> None:
        """Count one that was admitted less."""
        _less(self._connections, (monitor, uid))

    def _room(self, uid: int, *, monitor: bool) -> None:
        of_socket = sum(n for (kind, _), n in self._connections.items() if kind is monitor)
        limit, per_user = self.settings.max_connections, self.settings.max_connections_per_user
        if of_socket >= limit:
            raise Overloaded(f"there are {limit} connections already; try again later", limit=limit)
        if per_user and self._connections[monitor, uid] >= per_user:
            raise Overloaded(
                f"user {uid} has {per_user} connections already; close some", limit=per_user
            )

    # --- calls --------------------------------------------------------------------------------

    def permit(self, peer: Peer, groups: tuple[int, ...], kind: Kind) -> None:
        """PermissionDenied if the allow-list of this kind does not have the peer."""
        allow = self.settings.allow.get(kind)
        if allow is None or peer.uid == 0 or peer.uid in allow.uids:
            return
        if not set(allow.gids).intersection((peer.gid, *groups)):
            raise PermissionDenied(
                f"user {peer.uid} may not call methods that {_MEANING[kind]}: "
                f"the daemon's configuration lists who may",
                kind=kind,
            )

    def gate(self, peer: Peer, groups: tuple[int, ...], method: Method, *, monitor: bool) -> None:
        """Whether a call that arrives now is taken at all; raises why not."""
        if self.draining:
            raise ShuttingDown("the daemon is stopping and takes no new calls")
        if monitor and not method.monitor:
            raise PermissionDenied(
                f"{method.name} is not served on the monitor socket; use the control socket"
            )
        if self.settings.allow:
            self.permit(peer, groups, method.kind)

    def begin(self, uid: int) -> None:
        """A line is being worked on."""
        self.in_flight += 1
        self._calls[uid] = self._calls.get(uid, 0) + 1

    def end(self, uid: int) -> None:
        """It is answered."""
        self.in_flight -= 1
        _less(self._calls, uid)
        if self.draining and not self.in_flight:
            self.on_idle()

    def start(self, uid: int, method: Method) -> None:
        """A call is about to run; Overloaded if its user has too many running."""
        limit = self.settings.max_calls_per_user
        if limit and self._calls[uid] > limit:
            raise Overloaded(f"user {uid} has {limit} calls running already", limit=limit)
        if method.streams:
            limit = self.settings.max_archives_per_user
            if limit and self._archives[uid] >= limit:
                raise Overloaded(f"user {uid} has {limit} archives running already", limit=limit)
            self._archives[uid] += 1

    def stop(self, uid: int, method: Method) -> None:
        """A call that was started has ended."""
        if method.streams:
            _less(self._archives, uid)


def _less(counts: Counter[K], key: K) -> None:
    # what a Counter does for a missing key, and to delete one, is Python; this is on every call
    if (left := counts[key] - 1) > 0:
        counts[key] = left
    else:
        counts.pop(key)


_MEANING: dict[Kind, str] = {
    "read": "look at the store",
    "use": "use layers",
    "change": "change the store",
}
