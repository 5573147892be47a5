"""A round of what a daemon does all day, and what has to hold when one call of it has failed."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from aufsd_client import Client
from aufsd_client.errors import AufsdError, InternalError
from aufsd_client.wire import ConnectionLost, DaemonUnreachable
from tests.crash import store
from tests.crash.conftest import Fresh
from tests.crash.scenarios import FIRST, populate
from tests.crash.strace import Trace, traced
from tests.crash.subject import WITHIN, Subject
from tests.crash.sweep import Outcome, Point
from tests.daemon import eventually

# Each system call of the steady state and of the background tasks with what it can fail with: its
# man page, and for those of files what a disk or a file system may say. Not recv(2): with it Trio
# reads the pair of sockets that wakes it, and that cannot fail.
_DESCRIPTORS = ("EMFILE", "ENFILE", "ENOMEM")
_DISK = ("EIO", "ENOMEM", "EACCES", "EROFS", "ENOSPC")
ERRNOS: dict[str, tuple[str, ...]] = {
    "accept4": ("ECONNABORTED", "EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EPERM", "EPROTO"),
    "recvmsg": ("ECONNRESET", "ENOBUFS", "ENOMEM", "EINTR"),
    "sendmsg": ("EPIPE", "ECONNRESET", "ENOBUFS", "ENOMEM", "EINTR"),
    "sendto": ("EPIPE", "ECONNRESET", "ECONNREFUSED", "ENOBUFS", "ENOMEM", "EINTR"),
    "connect": ("ECONNREFUSED", "ENOENT", "EAGAIN", "EACCES"),
    "getsockopt": ("ENOBUFS", "EINVAL"),
    "epoll_ctl": ("ENOMEM", "ENOSPC"),
    "epoll_wait": ("EINTR",),
    "poll": ("EINTR", "ENOMEM"),
    "ppoll": ("EINTR", "ENOMEM"),
    "clone": ("EAGAIN", "ENOMEM"),
    "clone3": ("EAGAIN", "ENOMEM"),
    "mmap": ("ENOMEM",),
    "memfd_create": _DESCRIPTORS,
    "eventfd2": _DESCRIPTORS,
    "socket": (*_DESCRIPTORS, "ENOBUFS"),
    "socketpair": _DESCRIPTORS,
    "pipe2": ("EMFILE", "ENFILE"),
    "dup": ("EMFILE",),
    "pidfd_open": (*_DESCRIPTORS, "ESRCH"),
    "openat": (*_DESCRIPTORS, "EIO", "EACCES", "ESTALE"),
    "openat2": (*_DESCRIPTORS, "EIO", "EAGAIN"),
    "open_tree": (*_DESCRIPTORS, "EPERM"),
    "statx": ("EIO", "ENOMEM", "EACCES", "ESTALE"),
    "newfstatat": ("EIO", "ENOMEM", "EACCES", "ESTALE"),
    "fstat": ("EIO", "ENOMEM"),
    "statfs": ("EIO", "ENOMEM", "EINTR"),
    "fstatfs": ("EIO", "ENOMEM", "EINTR"),
    "readlink": ("EIO", "ENOMEM"),
    "readlinkat": ("EIO", "ENOMEM"),
    "read": ("EIO", "EINTR", "ENOMEM"),
    "pread64": ("EIO", "EINTR"),
    "write": ("EIO", "ENOSPC", "EINTR"),
    "getdents64": ("EIO", "ENOENT"),
    "getxattr": ("EIO", "ENOMEM", "EACCES"),
    "lgetxattr": ("EIO", "ENOMEM", "EACCES"),
    "fgetxattr": ("EIO", "ENOMEM", "EACCES"),
    "listxattr": ("EIO", "ENOMEM"),
    "flistxattr": ("EIO", "ENOMEM"),
    "unlinkat": (*_DISK, "EPERM", "EBUSY"),
    "unlink": (*_DISK, "EPERM"),
    "rmdir": (*_DISK, "EBUSY"),
    "rename": _DISK,
    "renameat2": _DISK,
    "mkdir": _DISK,
    "umount2": ("EBUSY", "ENOMEM", "EPERM"),
    "mount": ("ENOMEM", "EPERM", "EBUSY"),
}
# What a sound host never says of these calls is an incident, and the disk is to be looked at. A
# shortage is none.
_INCIDENTS = ("EIO", "EACCES", "EPERM", "EROFS", "ESTALE", "ENOENT", "EBUSY")
# epoll_ctl(2): only to add one takes memory (ep_modify() in fs/eventpoll.c), and Trio trusts it
_IMPOSSIBLE = ("EPOLL_CTL_MOD", "EPOLL_CTL_DEL")
_SCRAPE = "http://127.0.0.1:{}/metrics"
_HOLD = """
import socket, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
peer.sendall(b'{"jsonrpc":"2.0","id":1,"method":"get","params":{"id":"top","hold":"process"}}\\n')
peer.recv(4096)
"""
# a task that cannot do its work has said so in `health` after so many seconds
_TOLD_WITHIN = 5.0


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Round:
    """One round over a subject that serves layers `base` and `top`. `port` is for scrapes.

    `counted` is how often `top` may be referenced now, least and most: of a call whose connection
    was lost nobody knows.
    """

    subject: Subject
    port: int
    fault: str = ""
    least: int = 0
    most: int = 0
    problems: list[str] = field(default_factory=list)

    def work(self) -> None:
        """Do it all once; with a fault what is refused or lost is none, what is an incident is."""
        for step in (self._ask, self._mount, self._content, self._held, self._watched):
            self._tried(step)

    def _tried(self, do: Callable[[], object]) -> str:
        """Whether it was "done", "refused" or "lost"."""
        said, error = self._said(do)
        if error and not self.fault:
            self.problems.append(f"without a fault: {error!r}")
        return said

    def _said(self, do: Callable[[], object]) -> tuple[str, Exception | None]:
        try:
            do()
        except InternalError as error:
            if self.fault not in _INCIDENTS:
                self.problems.append(f"an incident: {error}")
            return "refused", error
        except AufsdError as error:
            return "refused", error
        except (ConnectionLost, DaemonUnreachable, OSError) as error:
            if isinstance(error, TimeoutError):
                self.problems.append(f"not answered: {error!r}")
            return "lost", error
        return "done", None

    def _ask(self) -> None:
        with self.subject.client() as client:
            client.ping()
            client.list()
            client.health()
            client.get_metadata("top")

    def _mount(self) -> None:
        with self.subject.client() as client:
            for _ in range(2):
                said = self._tried(lambda: client.get("top"))
                self.most += said != "refused"
                self.least += said == "done"
            said = self._tried(lambda: client.put("top"))
            self.least -= said != "refused" and self.least > 0
            self.most -= said == "done" and self.most > 0
            if said == "refused":
                # an unmount that fails: no reference is left (api.md, put)
                self.least = 0

    def _content(self) -> None:
        with self.subject.client() as client:
            for do in (
                lambda: client.create("new", parent="base"),
                lambda: client.apply_diff("new", FIRST),
                lambda: client.diff("new", bytearray()),
                lambda: client.changes("new"),
                lambda: client.check(),
                lambda: client.remove("new"),
            ):
                self._tried(do)

    def _held(self) -> None:
        """A process that holds a reference, and ends."""
        command = [sys.executable, "-IS", "-c", _HOLD, str(self.subject.directory / "a")]
        subprocess.run(command, check=False, capture_output=True, timeout=WITHIN)

    def _watched(self) -> None:
        """Scrapes, the monitoring socket, and a reload, of which the service manager is told."""
        with (
            suppress(OSError),
            urllib.request.urlopen(_SCRAPE.format(self.port), timeout=WITHIN) as answer,
        ):
            answer.read()
        with (
            suppress(OSError, AufsdError),
            Client(str(self.subject.directory / "m"), timeout=WITHIN) as client,
        ):
            client.metrics()
            client.status()
        os.kill(self.subject.pid, signal.SIGHUP)
        self.subject.read_notices()
        with self.subject.client() as client:
            client.ping()


@dataclass
class FaultSweep:
    """Rounds with one call failing, over one subject until something does not hold."""

    fresh: Fresh
    stack: ExitStack
    port: int = field(default_factory=free_port)
    _subject: Subject | None = None
    _descriptors: list[str] = field(default_factory=list)

    @property
    def subject(self) -> Subject:
        if self._subject is None:
            subject = self.stack.enter_context(self.fresh())
            # again, with a port for scrapes
            subject.start("--metrics-listen", f"127.0.0.1:{self.port}", "--sync", "none")
            assert subject.ready(), subject.log
            with subject.client() as client:
                populate(client)
                client.create("top", parent="base")
            self._subject = subject
            day = Round(subject, self.port)
            day.work()
            assert not (problems := list(self._wrong(day, ""))), problems
            self._descriptors = _descriptors(subject.pid)
        return self._subject

    def points(self, calls: Sequence[str], most: int) -> list[Point]:
        """Each call with each of its errnos, at most so many numbers of it: the first, and some."""
        with traced([self.subject.pid], f"trace={','.join(calls)}") as trace:
            day = Round(self.subject, self.port)
            day.work()
            assert not (problems := list(self._wrong(day, ""))), problems
        chosen, points = random.Random(3), []
        for call, count in sorted(trace.counts().items()):
            numbers = range(1, count + 1)
            some = sorted({1, *chosen.sample(numbers, min(most, count))})
            points += [
                Point("daemon", call, number, name) for name in ERRNOS[call] for number in some
            ]
        return points

    def run(self, points: Sequence[Point]) -> Outcome:
        """A round for each point."""
        outcome = Outcome()
        for point in points:
            outcome.points += 1
            trace, problems = self._break(point)
            outcome.reached += trace.injected
            if problems:
                outcome.failures.append("\n    ".join([f"{point}:", *problems]))
                self._end()
        return outcome

    def _end(self) -> None:
        """One failure must not make the next."""
        self.stack.close()
        self._subject, self._descriptors = None, []

    def _break(self, point: Point) -> tuple[Trace, list[str]]:
        subject = self.subject
        before = len(subject.log)
        day = Round(subject, self.port, point.fault)
        with traced([subject.pid], *point.expressions) as trace:
            day.work()
        where = next((line for line in trace.lines if "(INJECTED)" in line), "")
        if any(each in where for each in _IMPOSSIBLE):
            self._end()
            return trace, []
        problems = list(self._wrong(day, subject.log[before:] if not subject.died(0) else ""))
        if not problems:
            # and then all is done as ever
            after = Round(subject, self.port)
            after.work()
            problems = list(self._wrong(after, ""))
        if problems and where:
            problems.insert(0, where.strip()[:200])
        return trace, problems

    def _wrong(self, day: Round, log: str) -> Iterator[str]:
        """What does not hold after a round; at the end all is as before it."""
        subject = self.subject if self._subject is None else self._subject
        yield from day.problems
        if subject.died(0):
            yield f"the daemon died of it: {subject.log[-1500:]}"
            return
        with subject.client() as client:
            try:
                yield from self._settled(subject, client)
                rows = {row.id: row for row in client.mounts().mounts}
                counted = rows["top"].references if "top" in rows else 0
                if not day.least <= counted <= day.most:
                    yield f"top counts {counted}, not {day.least} to {day.most}"
                while client.put("top").references:
                    pass
                client.remove("new")
                yield from store.disorder(subject, client)
            except (AufsdError, AssertionError, ConnectionLost, DaemonUnreachable) as error:
                yield f"afterwards: {error!r}"
        for line in log.splitlines() if day.fault not in _INCIDENTS else ():
            if "Traceback" in line or '"incident"' in line:
                yield f"logged: {line[:1500]}"
        if self._descriptors:
            try:
                eventually(lambda: len(_descriptors(subject.pid)) <= len(self._descriptors))
            except AssertionError:
                more = Counter(_descriptors(subject.pid)) - Counter(self._descriptors)
                yield f"these descriptors stay open: {dict(more)}"

    def _settled(self, subject: Subject, client: Client) -> Iterator[str]:
        """Wait until nothing is left to be done; meanwhile `health` has to tell that."""
        untold = time.monotonic()
        deadline = untold + WITHIN
        while True:
            health = client.health()
            left = store.unsettled(subject.root)
            left += [
                f"a reference of process {each.pid}"
                for row in client.mounts().mounts
                for each in row.holders
                if each.hold == "process"
            ]
            if not left and health.status == "ok":
                return
            now = time.monotonic()
            if health.status != "ok":
                untold = now
            if now - untold > _TOLD_WITHIN:
                yield f"health is ok, and this is left: {left}"
                return
            if now > deadline:
                yield f"not settled: {left}; {[c for c in health.checks if c.status != 'ok']}"
                return
            time.sleep(0.02)


def _descriptors(pid: int) -> list[str]:
    """What a process has open, but for what it makes when it needs it first, and keeps."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(re.sub(r"\[\d+\]", "", os.readlink(f"/proc/{pid}/fd/{fd}")))
    return [each for each in found if each != "anon_inode:[eventfd]"]
