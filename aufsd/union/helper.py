"""The process that serves one FUSE mount: started, known again after a restart, waited for.

It outlives the daemon in a session of its own. It gets no unit of its own: the daemon's has
KillMode=process, and a scope would cost a call to systemd for every mount and would not exist in a
container or a user namespace.

Whether it lives is asked of a lock. Its standard error is a file in the layer's work directory, and
it holds flock(2) on that; the kernel drops the lock when the process ends, however it ends. Asking
is three system calls on a local file: it waits for nobody, survives a restart of the daemon, and no
reused pid can answer in its place. Who it is stands beside it, for those who wait for it.
"""

import fcntl
import os
import select
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from aufsd.kernel.peer import process

_LOG: Final = "helper.log"
_NAME: Final = "helper"
# of what it said, for an error
_SAID_MAX: Final = 2048


class Helper(msgspec.Struct, frozen=True):
    """A helper and what it serves: st_dev of the mount, and the writable branch (b"" for none).

    `start` is its start time in clock ticks since boot (proc_pid_stat(5), field 22).
    """

    pid: int
    start: int
    device: int
    top: bytes


def is_alive(work: str) -> bool:
    """Whether the helper of this work directory lives. Does not block."""
    try:
        log = os.open(f"{work}/{_LOG}", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(log)
    return False


def read(work: str) -> Helper | None:
    """The helper that was last recorded here, alive or not."""
    try:
        with open(f"{work}/{_NAME}", "rb") as file:
            return msgspec.json.decode(file.read(), type=Helper)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def record(work: str, helper: Helper) -> None:
    """Write down who the helper is, in one step."""
    fresh = f"{work}/{_NAME}.new"
    with open(fresh, "wb") as file:
        file.write(msgspec.json.encode(helper))
    os.rename(fresh, f"{work}/{_NAME}")


def forget(work: str) -> None:
    """Remove what is written down; harmless if nothing is."""
    for name in (_NAME, f"{_NAME}.new", _LOG, f"{_LOG}.new"):
        with suppress(FileNotFoundError):
            os.unlink(f"{work}/{name}")


def said(work: str) -> str:
    """The last that the helper of this work directory said, on one line."""
    with suppress(FileNotFoundError), open(f"{work}/{_LOG}", "rb") as file:
        text = file.read()[-_SAID_MAX:].decode("utf-8", "replace")
        return "; ".join(line for line in text.splitlines() if line)
    return ""


def start(
    work: str, arguments: Sequence[str], environment: Mapping[str, str], inherit: Sequence[int]
) -> int:
    """Start a helper; its pid.

    `arguments` begin with the program's path. `inherit` are descriptors that it keeps under their
    numbers; they stay the caller's here.
    """
    log = _new_log(work)
    try:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, log, 2),
            # to itself: that drops close-on-exec in the child alone (posix_spawn(3))
            *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherit),
        ]
        return os.posix_spawn(
            arguments[0],
            list(arguments),
            environment,
            file_actions=actions,
            setsid=True,
            # ignored in every Python process, and inherited
            setsigdef=[signal.SIGPIPE],
        )
    finally:
        os.close(log)


def wait(pid: int, started: int, seconds: float) -> bool:
    """Wait for a helper to end; whether it has. A child of ours is reaped."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        # the pid may be another process's by now
        if process(pid)[1] == started:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not poll.poll(seconds * 1000):
                return False
    finally:
        os.close(fd)
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return True


def _new_log(work: str) -> int:
    """A new file, locked before it has its name: so nobody who asks ever delays the one who starts.

    Opened to append, because the helper's messages come whenever they come.
    """
    fresh = f"{work}/{_LOG}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
    log = os.open(fresh, flags, 0o600)
    fcntl.flock(log, fcntl.LOCK_EX)
    os.rename(fresh, f"{work}/{_LOG}")
    return log
