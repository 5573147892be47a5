"""Descriptors that came over a connection: which line claims them, and when they are closed.

A received descriptor belongs to the daemon at once (unix(7), SCM_RIGHTS). A line claims it, or it
is closed. Nothing here waits.
"""

import fcntl
import os
import stat
from collections import deque
from contextlib import suppress

import structlog

from aufsd.kernel import syscalls
from aufsd.threads import Closing
from aufsd_client.errors import InvalidDescriptor, Overloaded

log = structlog.get_logger(__name__)

# the text in the document of rpc.discover
DESCRIPTORS = (
    "Always 0: the oldest descriptor of the connection that no line has claimed yet. Send it with "
    "SCM_RIGHTS in the sendmsg(2) of the line, or of a part of it: a pipe, a socket or a regular "
    "file, open for writing for diff and for reading for apply_diff. The daemon closes its copy "
    "when the call has ended."
)
# more than this many unclaimed ones, and the connection is dropped (docs/api.md, "Transport")
MAX_UNCLAIMED = 4
# The kernel may split a longer sendmsg(2) into segments; the descriptors come with the first one
# (net/unix/af_unix.c, unix_stream_sendmsg: 48 KiB a segment with the usual SO_SNDBUF).
SEGMENT = 32 << 10
# with so many files whose server does not answer, none is taken that may have such a one
_CLOSING_MOST = 16
_closing = Closing()


class Descriptors:
    """The unclaimed descriptors of one connection, oldest first.

    The kernel ends a read after a segment with descriptors. So the last byte of such a read belongs
    to that segment. If it ends in the middle of a line, that line may still claim them.
    """

    def __init__(self) -> None:
        # more of their sendmsg may come
        self._open: deque[int] = deque()
        # their sendmsg is read whole; only the unfinished line may still claim them
        self._last: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._open) + len(self._last)

    def receive(self, fds: list[int]) -> None:
        """Add the descriptors of a read."""
        self._open.extend(fds)

    def claim(self) -> int | None:
        """The oldest one, now owned by the caller; None if there is none."""
        if self._last:
            return self._last.popleft()
        return self._open.popleft() if self._open else None

    def line_done(self) -> None:
        """A line has claimed what it claims. Close those that only this line could claim."""
        _close(self._last)

    def read_done(self, *, length: int, unfinished: bool) -> None:
        """All whole lines of a read have claimed. `unfinished`: part of another line is there."""
        if length >= SEGMENT or not self._open:
            return
        if unfinished:
            self._last.extend(self._open)
            self._open.clear()
        else:
            _close(self._open)

    def close(self) -> None:
        """Close them all."""
        _close(self._last)
        _close(self._open)


def _close(fds: deque[int]) -> None:
    while fds:
        close(fds.popleft())


def close(fd: int) -> None:
    """Close a descriptor that a peer sent. Waits for no file's server longer than a moment.

    Raises nothing: what cannot be asked of the file, or of the host, is no reason to keep it.
    """
    name, served = "", True
    with suppress(OSError):
        served = _may_have_server(syscalls.fstatx(fd))
    if not served:
        with suppress(OSError):
            os.close(fd)
        return
    with suppress(OSError):
        name = os.readlink(f"/proc/self/fd/{fd}")
    if not _closing.close(fd):
        log.warning("the server of a file does not answer its close", file=name[:200])


def _may_have_server(file: syscalls.OpenFile) -> bool:
    """Whether somebody has to be asked about the file: it lies on no block device.

    Such are FUSE and NFS, and tmpfs and btrfs too, of which a close takes no time.
    """
    return not (stat.S_ISFIFO(file.mode) or stat.S_ISSOCK(file.mode) or os.major(file.device))


def require_stream(fd: int | None, *, write: bool) -> int:
    """The descriptor, if a tar can be read from it, or written to it; or InvalidDescriptor."""
    if fd is None:
        raise InvalidDescriptor(
            "no descriptor came with the call: send it with SCM_RIGHTS in the sendmsg of the line"
        )
    # stat(2) would ask a server
    file = syscalls.fstatx(fd)
    mode = file.mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISREG(mode)):
        raise InvalidDescriptor("the descriptor is not a pipe, a socket or a regular file")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    wanted = os.O_WRONLY if write else os.O_RDONLY
    if flags & os.O_PATH or flags & os.O_ACCMODE not in (wanted, os.O_RDWR):
        way = "writing" if write else "reading"
        raise InvalidDescriptor(f"the descriptor is not open for {way}")
    if _may_have_server(file) and _closing.going_on >= _CLOSING_MOST:
        raise Overloaded(
            f"{_CLOSING_MOST} files that came with calls cannot be closed, for their server does "
            "not answer; send the archive through a pipe",
            limit=_CLOSING_MOST,
        )
    return fd
