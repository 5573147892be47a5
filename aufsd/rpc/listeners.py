"""The two listening sockets: made with their owner and mode, and removed at the end."""

import errno
import grp
import os
import socket
import stat
from dataclasses import dataclass

import structlog

from aufsd_client.address import reachable

log = structlog.get_logger(__name__)

# "aufsd", docs/api.md, "Transport"
GROUP = "aufsd"
_BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket. `path` and `inode`: the socket file for `close` to unlink, if any."""

    sock: socket.socket
    monitor: bool
    path: str = ""
    inode: int = 0

    def close(self, *, unlink: bool = True) -> None:
        """Stop listening. A socket file that another daemon has made meanwhile stays."""
        if self.path and unlink:
            try:
                if os.lstat(self.path).st_ino == self.inode:
                    os.unlink(self.path)
            except FileNotFoundError:
                pass
        self.sock.close()


def bind(path: str, *, monitor: bool, group: str = GROUP) -> Listener:
    """Listen on a path: mode 0660 of the group, or 0666 for the monitor socket.

    A socket file that nobody listens on is replaced. Raises OSError: EADDRINUSE if somebody
    listens, EEXIST if something else is there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with reachable(path) as short:
            _clear(path, short)
            # bind(2) takes the file's mode from the socket's (net/unix/af_unix.c, unix_bind_bsd)
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(short)
            inode = os.lstat(short).st_ino
            if not monitor:
                _give_to_group(path, group)
            os.chmod(path, 0o666 if monitor else 0o660)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return Listener(sock, monitor, path, inode)


def _clear(path: str, short: str) -> None:
    """Remove the socket file that a killed daemon left."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "is there, and is not a socket", path)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(short)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            # the backlog is full, so somebody listens
            pass
    raise OSError(errno.EADDRINUSE, "another process listens on this socket", path)


def _give_to_group(path: str, group: str) -> None:
    try:
        gid = grp.getgrnam(group).gr_gid
    except KeyError:
        log.warning("no such group: the control socket is root's alone", group=group, path=path)
        return
    try:
        os.chown(path, -1, gid)
    except OSError as error:
        # in a user namespace the group may be missing (EINVAL), or the right (EPERM)
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise
        log.warning("the control socket cannot be given to the group", group=group, path=path)
