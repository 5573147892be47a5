"""The process at the other end of a connection, and the mounts that it sees."""

import errno
import os
import select
import socket
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

from aufsd.kernel import sight, syscalls

# <asm-generic/socket.h>, without names in Python: since Linux 4.13 and 6.5
_SO_PEERGROUPS: Final = 59
_SO_PEERPIDFD: Final = 77
# bytes, four a group: what Python's getsockopt takes (Modules/socketmodule.c), and what a process
# can have (NGROUPS_MAX of <linux/limits.h>)
_FEW_GROUPS: Final = 1024
_ALL_GROUPS: Final = 4 * 65536
# paths that are remembered for one peer
_REMEMBERED: Final = 256


@dataclass(slots=True)
class View:
    """What is known of the mounts that a process sees, for the life of its connection.

    If the process leaves our mount namespace, `is_near(anew=True)` notices.
    """

    pid: int
    start: int
    _near: bool | None = None
    _seen: set[Hashable] = field(default_factory=set)

    def is_near(self, *, anew: bool = False) -> bool:
        """Whether it is in our mount namespace; true if not known. Does not block."""
        if self._near is None or anew:
            near = sight.in_our_namespace(self.pid)
            if near is None or not self._is_there():
                return True
            self._near = near
        return self._near

    def has_seen(self, what: Hashable) -> bool:
        """Whether `remember` was called for this. Does not block."""
        return self._near or self.is_near() or what in self._seen

    def sees(self, path: str) -> bool:
        """Whether it sees the same at `path` as we do; true if not known. May block."""
        return sight.sees(self.pid, path) is not False or not self._is_there()

    def remember(self, what: Hashable) -> None:
        """Remember that the process sees this."""
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        self._seen.add(what)

    def _is_there(self) -> bool:
        """Whether the pid still belongs to this process."""
        try:
            return bool(self.start) and process(self.pid)[1] == self.start
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class Peer:
    """SO_PEERCRED at accept (unix(7)): the process that connected, in our pid namespace.

    `start` is its start time in clock ticks since boot, which with the pid names a process for
    good; 0 and an empty `comm` for one that was gone already, or that could not be looked at.
    """

    pid: int
    uid: int
    gid: int
    comm: str = ""
    start: int = 0
    view: View = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "view", View(self.pid, self.start))


def identify(sock: socket.socket, pid: int, uid: int, gid: int) -> Peer:
    """The peer, with its name and start time from /proc. Does not block.

    Another process may have its pid by now. If the kernel has a pidfd of the process that
    connected, the data of /proc counts only if that process still lives.
    """
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        # an older kernel (ENOPROTOOPT), or out of descriptors; ESRCH, EINVAL: it is gone
        if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENODATA):
            return Peer(pid, uid, gid)
        return _looked_at(pid, uid, gid)
    try:
        found = _looked_at(pid, uid, gid)
        return Peer(pid, uid, gid) if has_ended(pidfd) else found
    finally:
        os.close(pidfd)


def groups(sock: socket.socket) -> tuple[int, ...]:
    """The supplementary groups of the peer when it connected; none on an old kernel."""
    try:
        try:
            found = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _FEW_GROUPS)
        except OSError as error:
            if error.errno != errno.ERANGE:
                raise
            found = syscalls.getsockopt(
                sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, _ALL_GROUPS
            )
    except OSError:
        return ()
    return tuple(memoryview(found).cast("I"))


def _looked_at(pid: int, uid: int, gid: int) -> Peer:
    try:
        comm, start = process(pid)
    except OSError:  # no descriptor is left
        comm, start = "", 0
    return Peer(pid, uid, gid, comm, start)


def has_ended(pidfd: int) -> bool:
    """Whether the process of a pidfd has ended: then it is readable (pidfd_open(2))."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def process(pid: int) -> tuple[str, int]:
    """Name and start time of a process (proc_pid_stat(5), fields 2 and 22); ("", 0) if none.

    Raises OSError if it cannot be looked at now, for want of descriptors or memory: it may live.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    # the name stands in parentheses and may hold any byte, so it ends at the last one
    name, _, rest = text.rpartition(b")")
    comm = name.partition(b"(")[2].decode("utf-8", "replace")
    return comm, int(rest.split()[19])
