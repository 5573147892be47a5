"""Who may connect, what they may call, and how much at a time. Pure: it counts and refuses.

Each limit is for one socket or for one user. So a user of the monitor socket, which everybody may
open, cannot keep others off the control socket. Memory is counted for what connections have in it:
lines that are not complete or not begun, calls that wait, answers that the peer has not taken.
"""

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


# limits for each user but root, if the configuration has none
CONNECTIONS_PER_USER = 256  # on each socket
CALLS_PER_USER = 1024
ARCHIVES_PER_USER = 64
# bytes in memory for the connections of one user but root, by whether it is the monitor socket; and
# for all connections of the monitor socket together
BYTES_PER_USER = {False: 32 << 20, True: 16 << 20}
BYTES_MONITOR = 64 << 20


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What limits connections and calls; seconds and counts.

    A limit per user does not hold for root. 0: the limit above.
    """

    # for each of the two sockets
    max_connections: int = 2000
    # of one connection; beyond it, the connection is not read (docs/api.md, "Transport")
    max_in_flight: int = 64
    # per user, over all its connections; beyond: -32001
    max_connections_per_user: int = 0
    max_calls_per_user: int = 0
    max_archives_per_user: int = 0
    # for running calls to end, after the stop was asked for
    drain_timeout: float = 10.0
    # a peer that takes no reply for so long is dropped
    send_timeout: float = 30.0
    # without an entry, a kind is open to everybody who can open the socket
    allow: Mapping[Kind, Allow] = field(default_factory=dict)


# why peers are dropped: a line is too long, too many descriptors wait, answers are not taken in
# time, the protocol is another one, a user has too many bytes in memory
DROPPED = ("overlong", "descriptors", "slow", "http", "memory")


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of connections and calls: since the start, and now."""

    connections: int
    accepted: int
    refused: int
    in_flight: int
    # by reason, see DROPPED
    dropped: Mapping[str, int]


@dataclass(slots=True)
class Admission:
    """The counts of one server. `settings` may be replaced while it runs."""

    settings: ServerSettings
    # called when the last call ends while draining
    on_idle: Callable[[], None]
    # that the process may have (RLIMIT_NOFILE)
    descriptors: int = 1 << 20
    draining: bool = False
    in_flight: int = 0
    accepted: int = 0
    refused: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    # (monitor, uid) -> connections; uid -> calls, archives
    _connections: Counter[tuple[bool, int]] = field(default_factory=Counter)
    _calls: Counter[int] = field(default_factory=Counter)
    _archives: Counter[int] = field(default_factory=Counter)
    # (monitor, uid) -> bytes in memory
    _bytes: Counter[tuple[bool, int]] = field(default_factory=Counter)
    _bytes_monitor: int = 0

    def statistics(self) -> Statistics:
        """The counts as they are now."""
        return Statistics(
            connections=self._connections.total(),
            accepted=self.accepted,
            refused=self.refused,
            in_flight=self.in_flight,
            dropped=dict(self.dropped),
        )

    # --- connections --------------------------------------------------------------------------

    def admit(self, uid: int, *, monitor: bool) -> None:
        """Count one more connection. Raises Overloaded."""
        try:
            self._room(uid, monitor=monitor)
        except Overloaded:
            self.refused += 1
            raise
        self.accepted += 1
        self._connections[monitor, uid] += 1

    def leave(self, uid: int, *, monitor: bool) -> None:
        """Count one connection less."""
        _less(self._connections, (monitor, uid))

    def _room(self, uid: int, *, monitor: bool) -> None:
        of_socket = sum(n for (kind, _), n in self._connections.items() if kind is monitor)
        # of the descriptors, a quarter is for the monitor socket and half for the control socket
        open_files = self.descriptors // (4 if monitor else 2)
        limit = min(self.settings.max_connections, open_files)
        if of_socket >= limit:
            raise Overloaded(f"there are {limit} connections already; try again later", limit=limit)
        per_user = _limit(self.settings.max_connections_per_user, CONNECTIONS_PER_USER, uid)
        if per_user and self._connections[monitor, uid] >= per_user:
            raise Overloaded(
                f"user {uid} has {per_user} connections already; close some", limit=per_user
            )

    # --- memory -------------------------------------------------------------------------------

    def count_bytes(self, uid: int, change: int, *, monitor: bool) -> None:
        """Count `change` bytes more (or less) in memory for a user's connections.

        Raises Overloaded above the limit. The bytes are counted all the same.
        """
        key = (monitor, uid)
        self._bytes[key] += change
        if not self._bytes[key]:
            del self._bytes[key]
        if monitor:
            self._bytes_monitor += change
        if change <= 0:
            return
        limit = BYTES_PER_USER[monitor]
        if uid and self._bytes[key] > limit:
            raise Overloaded(
                f"the connections of user {uid} hold more than {limit >> 20} MiB of requests and "
                "answers; read the answers, or ask for less at a time",
                limit=limit,
            )
        if monitor and self._bytes_monitor > BYTES_MONITOR:
            raise Overloaded(
                "the monitor socket holds as much as it may; try again later", limit=BYTES_MONITOR
            )

    # --- calls --------------------------------------------------------------------------------

    def permit(self, peer: Peer, groups: tuple[int, ...], kind: Kind) -> None:
        """Raises PermissionDenied if the allow-list of this kind does not have the peer."""
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
        """Raises ShuttingDown, PermissionDenied or Overloaded if a call may not be made now."""
        if self.draining:
            raise ShuttingDown("the daemon is stopping and takes no new calls")
        if monitor and not method.monitor:
            raise PermissionDenied(
                f"{method.name} is not served on the monitor socket; use the control socket"
            )
        if self.settings.allow:
            self.permit(peer, groups, method.kind)
        limit = _limit(self.settings.max_calls_per_user, CALLS_PER_USER, peer.uid)
        if limit and self._calls.get(peer.uid, 0) >= limit:
            raise Overloaded(f"user {peer.uid} has {limit} calls running already", limit=limit)

    def begin(self, uid: int) -> None:
        """Count one more call that waits, or answer that the peer has not taken."""
        self.in_flight += 1
        self._calls[uid] += 1

    def end(self, uid: int) -> None:
        """Count one less."""
        self.in_flight -= 1
        _less(self._calls, uid)
        if self.draining and not self.in_flight:
            self.on_idle()

    def begin_archive(self, uid: int) -> None:
        """Count one more archive of this user. Raises Overloaded."""
        limit = _limit(self.settings.max_archives_per_user, ARCHIVES_PER_USER, uid)
        if limit and self._archives[uid] >= limit:
            raise Overloaded(f"user {uid} has {limit} archives running already", limit=limit)
        self._archives[uid] += 1

    def end_archive(self, uid: int) -> None:
        """Count one archive less."""
        _less(self._archives, uid)


def _limit(setting: int, default: int, uid: int) -> int:
    return setting or (default if uid else 0)


def _less(counts: Counter[K], key: K) -> None:
    if (left := counts[key] - 1) > 0:
        counts[key] = left
    else:
        counts.pop(key)


_MEANING: dict[Kind, str] = {
    "read": "look at the store",
    "use": "use layers",
    "change": "change the store",
}
