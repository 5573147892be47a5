"""Sockets inherited from systemd (sd_listen_fds(3))."""

import os
import socket

_FIRST = 3


def inherited() -> dict[str, socket.socket]:
    """Listening sockets by name (FileDescriptorName=), owned by the caller; none is the usual case.

    The variables are taken out of the environment, so that no child takes them for its own.
    """
    ours = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    count = int(os.environ.pop("LISTEN_FDS", "0") or 0)
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if not ours:
        return {}
    found = {}
    for index in range(count):
        fd = _FIRST + index
        os.set_inheritable(fd, False)
        name = names[index] if index < len(names) else str(index)
        found[name] = socket.socket(fileno=fd)
    return found
