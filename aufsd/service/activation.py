"""Sockets inherited from systemd (sd_listen_fds(3))."""

import os
import socket
from collections.abc import Collection

from aufsd.digits import number

_FIRST = 3
# more than any process has
_MOST = 1 << 30


def inherited(names: Collection[str]) -> dict[str, socket.socket]:
    """Listening Unix sockets by name (FileDescriptorName=); the caller owns them.

    Usually there are none. The variables are taken out of the environment, so that no child takes
    them for its own. Raises OSError for a descriptor that is no such socket or has another name.
    That is a mistake in a unit; to listen elsewhere instead would hide it.
    """
    ours = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    count = os.environ.pop("LISTEN_FDS", "")
    given = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    passed = number(count, _MOST)
    if not ours or not count:
        return {}
    if passed is None:
        raise OSError(f"the service manager says {count[:20]!r} in LISTEN_FDS, which is no number")
    found: dict[str, socket.socket] = {}
    for index in range(passed):
        fd = _FIRST + index
        os.set_inheritable(fd, False)
        name = given[index] if index < len(given) else ""
        if name not in names or name in found:
            raise OSError(
                f"the service manager passed a socket named {name!r}; "
                f"FileDescriptorName= has to be one of: {', '.join(names)}"
            )
        found[name] = _listening(fd, name)
    return found


def _listening(fd: int, name: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise OSError(error.errno, f"passed as the {name} socket: {error.strerror}") from None
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM) or not listens:
        raise OSError(f"passed as the {name} socket: not a Unix stream socket that listens")
    return sock
