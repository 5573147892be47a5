"""How far a tar is, on a terminal: bytes, rate and, where the whole is known, the time left."""

import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from aufsd_client import calls, link
from aufsd_client.cli.session import Session
from aufsd_client.errors import AufsdError
from aufsd_client.parsing import parse
from aufsd_client.results import Status
from aufsd_client.wire import DEFAULT_SOCKET, BadReply

# seconds: what is over before this shows nothing
_BEFORE: Final = 1.0
_BETWEEN: Final = 0.25


@contextmanager
def of_tar(session: Session, kind: str, id: str, fd: int, *, reads: bool = False) -> Iterator[None]:
    """While the block runs, show how far the daemon's job of a layer is, on a terminal.

    `kind` is the job's, `fd` the tar's descriptor, which stays the caller's. `reads`: the tar comes
    from there, and so its size is the whole.
    """
    if session.as_json or not sys.stderr.isatty():
        yield
        return
    total = _size(fd) if reads else None
    moved = _by_file(fd) or _by_status(session, id, kind)
    with _beside(partial(_watch_tar, f"{kind} {id}", moved, total)):
        yield


@contextmanager
def of_work(session: Session, what: str) -> Iterator[None]:
    """While the block runs, show on a terminal for how long it has."""
    if session.as_json or not sys.stderr.isatty():
        yield
        return
    with _beside(partial(_watch_work, what)):
        yield


@contextmanager
def _beside(watch: Callable[[threading.Event], None]) -> Iterator[None]:
    """A thread beside the block, which is told when that is over."""
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(over,))
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch_work(what: str, over: threading.Event) -> None:
    if over.wait(_BEFORE):
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task(what, total=None)
        over.wait()


def _watch_tar(
    what: str, moved: Callable[[], int], total: int | None, over: threading.Event
) -> None:
    if over.wait(_BEFORE):
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    left = TimeElapsedColumn() if total is None else TimeRemainingColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, TransferSpeedColumn(), left, console=console, transient=True) as bar:
        task = bar.add_task(escape(what), total=total)
        while not over.wait(_BETWEEN):
            bar.update(task, completed=moved())


def _size(fd: int) -> int | None:
    """The bytes of a regular file that are still to be read; None of anything else."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        return None
    return max(0, found.st_size - os.lseek(fd, 0, os.SEEK_CUR))


def _by_file(fd: int) -> Callable[[], int] | None:
    """By the offset of a regular file: the daemon has the same open file (unix(7), SCM_RIGHTS)."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return None
    start = os.lseek(fd, 0, os.SEEK_CUR)
    return lambda: os.lseek(fd, 0, os.SEEK_CUR) - start


def _by_status(session: Session, id: str, kind: str) -> Callable[[], int]:
    """By what the daemon says of its jobs; as before where it does not answer."""
    path = session.socket or DEFAULT_SOCKET
    request = calls.status()
    last = 0

    def moved() -> int:
        nonlocal last
        try:
            answer = link.ask(path, request.method, request.params, timeout=5.0)
            jobs = parse(Status, answer).jobs
        except (AufsdError, BadReply, OSError):
            return last
        last = max((job.bytes for job in jobs if (job.id, job.kind) == (id, kind)), default=last)
        return last

    return moved
