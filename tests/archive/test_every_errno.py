"""Every errno that a file system may give to every call that unpacking makes: a proper error, never
an incident, and whatever comes next is not disturbed.

A run makes each call fail once, and each errno come once. All pairs take some minutes:

    AUFSD_ERRNOS=all .venv/bin/python -m pytest tests/archive/test_every_errno.py
"""

import errno
import fcntl
import os
import struct
import tempfile
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tarfile import FIFOTYPE

import pytest
import trio

from aufsd.archive.errnos import ANSWERS
from aufsd.store.dialect import WITH_MARKS, Dialect
from aufsd_client.errors import (
    ArchiveEscape,
    AufsdError,
    BadArchive,
    LayerDamaged,
    LimitExceeded,
    NoSpace,
    PermissionDenied,
    StreamBroken,
)
from tests.archive.shelf import Shelf, open_shelf, snapshot
from tests.archive.tars import directory, entry, link, symlink, tar
from tests.crash.strace import Trace, traced

pytestmark = [pytest.mark.mounts, pytest.mark.crash]

# what a job makes of its own memory and its socket, and never of a layer
NOT_OF_A_LAYER = frozenset(
    {
        *("mmap", "munmap", "mremap", "mprotect", "madvise", "brk", "futex", "poll", "ppoll"),
        *("sendto", "sendmsg", "recvmsg", "recvfrom", "exit_group", "getpid", "gettid"),
        *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "setitimer", "clock_gettime"),
        *("prlimit64", "getrandom", "sched_yield", "umask", "restart_syscall"),
    }
)
PROPER = (
    *(ArchiveEscape, BadArchive, LayerDamaged, LimitExceeded, NoSpace, PermissionDenied),
    StreamBroken,
)
XATTRS = {"SCHILY.xattr.user.a": "b"}


def body() -> bytes:
    """Something of every kind, and what was put once is replaced and deleted."""
    return tar(
        directory("./", mode=0o755),
        directory("d", pax_headers=XATTRS, uid=3),
        entry("d/plain", b"x" * 100),
        entry("d/more", b"x" * 100),
        entry("d/xattrs", b"x", mode=0o4755, uid=7, pax_headers=XATTRS),
        entry("d/large", os.urandom(3 << 20)),
        entry("d/hole", bytes(3 << 20)),
        symlink("d/symlink", "plain"),
        link("d/link", "d/plain"),
        entry("d/fifo", type=FIFOTYPE),
        entry("d/.wh.gone"),
        entry("d/.wh..wh..opq"),
        entry("d/plain", b"again"),
        directory("e/f/g"),
        entry("e/f/g/h", b"x"),
        entry("e", b"in the place of a directory"),
        entry("below/implied/x", b"x"),
        entry("below/.wh.gone"),
        entry("nowhere/.wh.gone"),
    )


@pytest.fixture
async def shelf(tmp_path: Path) -> AsyncIterator[Shelf]:
    async with open_shelf(tmp_path, sync="filesystem") as made:
        (made.add("p") / "below/implied").mkdir(parents=True)
        (made.path("p") / "below/gone").touch()
        yield made


async def attempt(shelf: Shelf, id: str, *expressions: str) -> tuple[AufsdError | None, Trace]:
    """Apply the archive, with the process of the job traced from its first entry on."""
    found: list[AufsdError] = []
    stream = body()
    with pipe() as (r, w):
        os.write(w, stream[:512])

        async def apply() -> None:
            try:
                await shelf.jobs.apply(shelf.chain(id, "p"), str(shelf.path(id)), r)
            except AufsdError as error:
                found.append(error)
            finally:
                # nobody reads any more
                os.close(r)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(apply)
            while unread(r) or not all(job.pid for job in shelf.jobs.jobs.values()):
                await trio.sleep(0.002)
            [job] = shelf.jobs.jobs.values()
            with traced([job.pid], *expressions) as trace:
                with suppress(BrokenPipeError):
                    await trio.to_thread.run_sync(write_all, w, stream[512:])
                os.close(w)
                while shelf.jobs.jobs:
                    await trio.sleep(0.002)
    return (found[0] if found else None), trace


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for fd in ends:
            with suppress(OSError):
                os.close(fd)


def unread(fd: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0])


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def pairs(calls: list[str]) -> Iterator[tuple[str, int]]:
    numbers = sorted(ANSWERS)
    if os.environ.get("AUFSD_ERRNOS") == "all":
        yield from ((call, number) for call in calls for number in numbers)
        return
    for index in range(max(len(calls), len(numbers))):
        yield calls[index % len(calls)], numbers[index % len(numbers)]


@pytest.mark.parametrize("dialect", WITH_MARKS)
async def test_every_call_of_unpacking_may_fail(shelf: Shelf, dialect: Dialect) -> None:
    shelf.add("whole", dialect)
    error, trace = await attempt(shelf, "whole", "trace=all")
    assert error is None
    calls = sorted(set(trace.counts()) - NOT_OF_A_LAYER)
    assert {"openat", "write", "linkat", "mkdir", "mknodat", "unlink", "syncfs"} <= {*calls}
    whole = snapshot(shelf.path("whole"))
    wrong = []
    for index, (call, number) in enumerate(pairs(calls)):
        name = errno.errorcode[number]
        # who is interrupted, or told to wait, goes on (PEP 475): once is enough
        when = ":when=1" if number in (errno.EINTR, errno.EAGAIN) else ""
        id = f"layer{index}"
        shelf.add(id, dialect)
        inject = f"inject={call}:error={number}{when}"
        with trio.fail_after(60):
            error, trace = await attempt(shelf, id, f"trace={call}", inject)
        if not trace.injected:
            wrong.append((call, name, "never made", ""))
        if error is not None and not (isinstance(error, PROPER) and error.message):
            wrong.append((call, name, type(error).__name__, error.message))
    assert wrong == []
    # the next one has all that it needs
    shelf.add("next", dialect)
    with tempfile.TemporaryFile() as file:
        file.write(body())
        file.seek(0)
        await shelf.jobs.apply(shelf.chain("next", "p"), str(shelf.path("next")), file.fileno())
    assert snapshot(shelf.path("next")).keys() == whole.keys()
