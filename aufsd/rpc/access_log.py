"""The log line of every call, and a limit on how much log a peer can cause.

Anybody may open the monitor socket and send a million requests that are refused. So ids and reasons
are cut, and refusals of a user are logged at a limited rate. The log says how many were left out.
"""

import time

import structlog
import trio

from aufsd.kernel.peer import Peer
from aufsd.rpc.dispatch import Request
from aufsd.service.log import RateLimit, emit

log = structlog.get_logger(__name__)

# characters that are logged of an id, and of the reason of a refusal
_SUBJECT, _REASON = 200, 500
# refusals and dropped peers of one user, and of all: so many lines at once, then so many a second
_BURST, _RATE = 100, 10.0
_ALL_BURST, _ALL_RATE = 1000, 50.0
# how often the log says how many lines were left out
_TELL = 10.0  # seconds


class AccessLog:
    """Writes the lines. `run` reports those that were left out."""

    def __init__(self) -> None:
        self._users = RateLimit(_BURST, _RATE)
        self._all = RateLimit(_ALL_BURST, _ALL_RATE)
        self._left_out = trio.Event()

    def call(self, peer: Peer, request: Request, seconds: float) -> None:
        """Log a call that has ended: at info if it uses or changes the store, or was refused."""
        row, error = request.row, request.error
        # a line that never became a call is the peer's own business
        quiet = row is None or (row.kind == "read" and error is None)
        if error is not None and not quiet and not self._allows(peer):
            return
        fields = {
            "method": row.name if row else None,
            "layer": _cut(request.subject),
            "outcome": request.outcome,
            "seconds": round(seconds, 6),
            "pid": peer.pid,
            "uid": peer.uid,
            "comm": peer.comm,
        }
        if error is not None:
            fields["reason"] = error.message[:_REASON]
            if incident := error.data.get("incident"):
                fields["incident"] = incident
        emit("debug" if quiet else "info", "call", fields)

    def dropped(self, peer: Peer, reason: str) -> None:
        """A peer that misbehaved was dropped."""
        if self._allows(peer):
            known = {"pid": peer.pid, "uid": peer.uid, "gid": peer.gid}
            log.warning("peer dropped", reason=reason, **known, comm=peer.comm, start=peer.start)

    async def run(self) -> None:
        """Report every _TELL seconds how many lines were left out, if any. Endless."""
        while True:
            await self._left_out.wait()
            await trio.sleep(_TELL)
            self._left_out = trio.Event()
            self.tell()

    def tell(self) -> None:
        """Log how many lines of each user were left out since the last time."""
        for uid, count in sorted(self._users.take_left_out().items()):
            log.warning("refusals were not logged", uid=uid, count=count)
        for count in self._all.take_left_out().values():
            log.warning("refusals were not logged", uid="any", count=count)

    def _allows(self, peer: Peer) -> bool:
        now = time.monotonic()
        if self._users.allows(peer.uid, now) and self._all.allows(0, now):
            return True
        self._left_out.set()
        return False


def _cut(subject: object) -> object:
    """The layer's id that a peer sent, cut for the log."""
    if subject is None or isinstance(subject, str):
        return subject and subject[:_SUBJECT]
    return f"<{type(subject).__name__}>"
