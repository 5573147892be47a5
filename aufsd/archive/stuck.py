"""Archive processes that no signal reaches, for they wait in the kernel for their stream.

A FUSE server that took a request and never answers it holds whoever asked, SIGKILL or not
(request_wait_answer() in fs/fuse/dev.c); so does the server of a network file system. Such a
process goes when its server answers or ends. Until then it is let go of: it writes nothing any
more, holds nobody's place, and is told.
"""

import os
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import structlog

from aufsd_client.errors import Overloaded

log = structlog.get_logger(__name__)

# with so many, no job is begun whose stream is a file: each holds memory and descriptors
MOST: Final = 16

# <linux/sched.h>, in field 9 of proc_pid_stat(5)
_PF_EXITING: Final = 0x4


@dataclass(frozen=True, slots=True)
class StuckProcess:
    """One of them; the job that it had is over. `since` is seconds since 1970."""

    id: str
    kind: str
    pid: int
    stream: str
    since: float


@dataclass(slots=True)
class Stuck:
    """Those that live still, by pidfd, which it owns."""

    held: dict[int, StuckProcess] = field(default_factory=dict)

    def add(self, pidfd: int, process: StuckProcess) -> None:
        """Keep one until it ends. The descriptor stays the caller's."""
        self.held[os.dup(pidfd)] = process
        log.warning(
            "an archive process waits for its stream and cannot be ended",
            id=process.id,
            kind=process.kind,
            process=process.pid,
            stream=process.stream[:200],
        )

    def living(self) -> list[StuckProcess]:
        """Those that have not ended meanwhile. Does not block."""
        for pidfd in list(self._ended()):
            process = self.held.pop(pidfd)
            os.close(pidfd)
            log.info("an archive process has ended", id=process.id, process=process.pid)
        return list(self.held.values())

    def refuse_file(self, stream: str) -> None:
        """Overloaded if the stream of a new job is a file, and too many wait for such ones."""
        if is_file(stream) and len(self.living()) >= MOST:
            raise Overloaded(
                f"{MOST} archive processes wait for files whose server does not answer; "
                "send the archive through a pipe",
                limit=MOST,
            )

    def _ended(self) -> Iterator[int]:
        poll = select.poll()
        for pidfd in self.held:
            poll.register(pidfd, select.POLLIN)
        yield from (pidfd for pidfd, _ in poll.poll(0))

    def close(self) -> None:
        """Forget all."""
        while self.held:
            os.close(self.held.popitem()[0])


def stream_name(fd: int) -> str:
    """What /proc calls one of our open files: a path, pipe:[N] or socket:[N]. Does not block."""
    return os.readlink(f"/proc/self/fd/{fd}")


def is_file(stream: str) -> bool:
    """Whether it is neither a pipe nor a socket, which any signal interrupts."""
    return stream.startswith("/")


def waits_for(pid: int, stream: str) -> bool:
    """Whether a process waits in a system call whose first argument is this open file.

    As far as the kernel tells (proc_pid_syscall(5)). Does not block, and asks no file's server.
    """
    try:
        with open(f"/proc/{pid}/syscall", encoding="ascii") as file:
            words = file.read().split()
        # "running", or -1 for a wait that is in no call
        if len(words) < 2 or words[0] == "-1":
            return False
        return os.readlink(f"/proc/{pid}/fd/{int(words[1], 16)}") == stream
    except (OSError, OverflowError):
        return False


def is_exiting(pid: int) -> bool:
    """Whether a process carries out no more code of its own: its files are being closed.

    A FUSE server is asked at each close, and waited for (fuse_flush() in fs/fuse/file.c).
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            flags = int(file.read().rpartition(b")")[2].split()[6])
    except (OSError, IndexError):
        return False
    return bool(flags & _PF_EXITING)


def stuck_now(id: str, kind: str, pid: int, stream: str) -> StuckProcess:
    """The process as it is from now on."""
    return StuckProcess(id, kind, pid, stream, time.time())
