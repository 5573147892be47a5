"""The process that serves one FUSE mount: starts it, finds it again after a restart, waits for it.

It outlives the daemon, in a session of its own. It has no systemd unit. The daemon's unit has
KillMode=process, so systemd does not kill it; a scope would need a call to systemd for every mount,
and there is no systemd in a container or a user namespace.

A lock tells whether it lives. Its standard error is a file in the layer's work directory, which it
has locked with flock(2). The kernel releases the lock when the process ends. To test the lock takes
three system calls on a local file. It never waits, works after a restart of the daemon, and another
process with the same pid cannot be mistaken for it. A file beside it has its pid and start time.
"""

import errno
import fcntl
import os
import select
import signal
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Final

import msgspec

from aufsd.kernel.peer import process

_LOG: Final = "helper.log"
_NAME: Final = "helper"
# bytes of its messages in an error
_SAID_MAX: Final = 2048
_LONGEST: Final = 1 << 20
# a fifo would be waited for
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_FILE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)


class Helper(msgspec.Struct, frozen=True):
    """A helper and what it serves: st_dev of the mount, and the writable branch (b"" for none).

    `start` is its start time in clock ticks since boot (proc_pid_stat(5), field 22).
    """

    pid: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    start: int
    device: int
    top: bytes


def is_alive(work: str) -> bool:
    """Whether the helper of this work directory lives. Does not block."""
    try:
        log = os.open(f"{work}/{_LOG}", _READ)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
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
        return msgspec.json.decode(_read(work, _NAME), type=Helper)
    except msgspec.DecodeError:
        return None


def record(work: str, helper: Helper) -> None:
    """Record the helper, in one step."""
    fresh = _new_file(work, _NAME)
    try:
        os.write(fresh, msgspec.json.encode(helper))
    finally:
        os.close(fresh)
    os.rename(f"{work}/{_NAME}.new", f"{work}/{_NAME}")


def forget(work: str) -> None:
    """Remove the record; harmless if there is none."""
    for name in (_NAME, f"{_NAME}.new", _LOG, f"{_LOG}.new"):
        with suppress(FileNotFoundError):
            os.unlink(f"{work}/{name}")


def said(work: str) -> str:
    """The last messages of the helper of this work directory, on one line."""
    text = _read(work, _LOG)[-_SAID_MAX:].decode("utf-8", "replace")
    return "; ".join(line for line in text.splitlines() if line)


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
    """Wait for a helper to end. Whether it has. A child of the daemon is reaped."""
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
    log = _new_file(work, _LOG)
    fcntl.flock(log, fcntl.LOCK_EX)
    os.rename(f"{work}/{_LOG}.new", f"{work}/{_LOG}")
    return log


def _new_file(work: str, name: str) -> int:
    """A new file beside `name`, that nothing else leads to or from; its descriptor."""
    with suppress(FileNotFoundError):
        os.unlink(f"{work}/{name}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
    return os.open(f"{work}/{name}.new", flags, 0o600)


def _read(work: str, name: str) -> bytes:
    """What a file of the work directory holds, in its end; nothing, if it is none."""
    try:
        fd = os.open(f"{work}/{name}", _READ)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        return b""
    try:
        found = os.fstat(fd)
        begin = max(0, found.st_size - _LONGEST)
        return os.pread(fd, _LONGEST, begin) if stat.S_ISREG(found.st_mode) else b""
    finally:
        os.close(fd)
