"""Jobs while they run: their processes, a pipe to feed them, how they fail."""

import contextlib
import os
import signal
from collections.abc import Awaitable, Iterator
from pathlib import Path

import trio
import trio.testing

from aufsd.archive.fork import ForkServer
from aufsd.results import Streamed
from aufsd_client.errors import (
    AufsdError,
)
from tests.archive.shelf import Shelf
from tests.daemon import eventually


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(pid) for pid in file.read().split()]


def stop(pid: int) -> None:
    """Stop a process, and wait until it is, or has ended: till then it may fork, or take a job."""

    def stopped() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZX"
        except (FileNotFoundError, ProcessLookupError):
            return True

    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    eventually(stopped)


def processes(server: ForkServer) -> list[int]:
    """What was forked from the server: the first of its namespace, and the children of that."""
    assert server.process is not None
    # none of either while it still gets ready
    first = children_of(server.process.pid)
    return [*first, *(child for pid in first for child in children_of(pid))]


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    r, w = os.pipe()
    try:
        yield r, w
    finally:
        for fd in (r, w):
            with contextlib.suppress(OSError):
                os.close(fd)


async def until_running(shelf: Shelf, size: int = 0) -> int:
    """Wait until a job has its child and said that it is so far; the child's pid."""
    while True:
        for job in shelf.jobs.jobs.values():
            if job.pid and job.bytes >= size:
                return job.pid
        await trio.sleep(0.005)


async def apply(shelf: Shelf, source: int, id: str = "a") -> Streamed:
    return await shelf.jobs.apply(shelf.chain(id), str(shelf.path(id)), source)


async def failure(call: Awaitable[object], into: list[AufsdError]) -> None:
    """Put what the call raises into a list."""
    try:
        await call
    except AufsdError as error:
        into.append(error)


def begin_peak() -> int:
    """Forget the peak that this process had: it is what it holds now, in KiB (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak(os.getpid())


def peak(pid: int) -> int:
    """Peak resident size of a process in KiB."""
    with open(f"/proc/{pid}/status") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("VmHWM")), 0)
