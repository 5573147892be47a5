"""Archive jobs, as the daemon sees them: a child process each, forked by a server kept for that.

The daemon opens what a job may see as detached mounts (open_tree(2)) and sends descriptors; paths
mean nothing to a child. A job's socket ending without a result means that its child was killed.
"""

import array
import contextlib
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import structlog
import trio

from aufsd import results
from aufsd.archive import requests
from aufsd.archive.fork import ForkServer
from aufsd.archive.requests import Branch, Limits, Settings
from aufsd.kernel import syscalls as sc
from aufsd.store.dialect import Dialect
from aufsd.store.idmap import IdMap
from aufsd.store.layout import Layout
from aufsd_client.errors import InternalError, Overloaded, from_wire

log = structlog.get_logger(__name__)

_LINE = 1 << 16
# a page of changes is four megabytes of paths, and one more path, which may be long
_REPLY_MAX = 64 << 20


@dataclass(slots=True)
class _Running:
    """A job that has its child, and how far it said it is."""

    id: str
    kind: str
    since: float
    bytes: int = 0
    entries: int = 0
    # 0 until the child said its first line
    pid: int = 0


@dataclass(slots=True)
class Jobs:
    """Runs archive jobs. Every method may raise Overloaded, and InternalError if the child dies.

    Cancelled while it waits, a job was not begun. Cancelled later, its child is killed, and the
    call ends when that is gone; what it wrote by then is where it wrote it.
    """

    layout: Layout
    settings: Settings
    max_waiting: int
    slots: trio.CapacityLimiter
    # of their own, so that no mount waits for somebody's slow stream
    conversions: trio.CapacityLimiter
    server: ForkServer
    jobs: dict[int, _Running] = field(default_factory=dict)
    # for metrics, by kind: jobs that ended, and what they had moved by then
    done: Counter[str] = field(default_factory=Counter)
    done_bytes: Counter[str] = field(default_factory=Counter)
    done_entries: Counter[str] = field(default_factory=Counter)

    async def diff(
        self,
        chain: tuple[Branch, ...],
        out: int,
        *,
        against: tuple[Branch, ...] | None = None,
        digest: bool = False,
    ) -> results.Streamed:
        """Write what chain[0] changed as a tar to the descriptor `out`, which stays the caller's.

        `against` is another chain to compare with, () for no layer at all; None for the layer's own
        content, which is what it changed against its parent. Raises StreamBroken, also when nobody
        reads for `stream_timeout` seconds.
        """
        work = requests.Diff(chain, against, digest)
        root = self._content(chain[0]) if against is None else self.layout.diff
        result = await self._run(chain[0].id, "diff", work, [root], [out])
        return _expect(result, requests.Packed).streamed

    async def apply(
        self, chain: tuple[Branch, ...], staging: str, source: int, *, digest: bool = False
    ) -> results.Streamed:
        """Unpack the tar from `source` into the directory `staging`, as chain[0].

        Earlier content may lie there (`clone`). The descriptor stays the caller's. The result's
        `size` is that of all regular files there, its digest that of the bytes read, as they were
        sent. Raises BadArchive, ArchiveEscape, StreamBroken, LimitExceeded, NoSpace; then, and when
        cancelled, staging is to be thrown away.
        """
        return (await self.apply_recorded(chain, staging, source, digest=digest)).streamed

    async def apply_recorded(
        self, chain: tuple[Branch, ...], staging: str, source: int, *, digest: bool
    ) -> requests.Packed:
        """As `apply`; with what is to be recorded of the layer, "" for nothing."""
        work = requests.Apply(chain, digest)
        mounts = [staging, self.layout.diff]
        result = await self._run(chain[0].id, "apply_diff", work, mounts, [source])
        return _expect(result, requests.Packed)

    async def fingerprint(self, branch: Branch) -> str:
        """What an apply would record of the layer as it is now. Raises InternalError (EIO)."""
        work = requests.Fingerprint(branch)
        result = await self._run(branch.id, "check", work, [self._content(branch)], [])
        return _expect(result, requests.Fingerprinted).fingerprint

    async def changes(
        self,
        chain: tuple[Branch, ...],
        *,
        against: tuple[Branch, ...],
        after: str = "",
        limit: int = 10000,
    ) -> results.Changes:
        """What differs between the merged views of two chains, one page.

        `after` is a page's `next`: the base64 of its last path. Raises InvalidParams if it is not.
        """
        work = requests.Compare(chain, against, after, limit)
        result = await self._run(chain[0].id, "changes", work, [self.layout.diff], [])
        return _expect(result, requests.Compared).changes

    async def diff_size(
        self, chain: tuple[Branch, ...], *, against: tuple[Branch, ...] | None = None
    ) -> int:
        """Bytes of the regular files that `diff` would write, each inode once."""
        work = requests.Measure(chain, against)
        root = self._content(chain[0]) if against is None else self.layout.diff
        result = await self._run(chain[0].id, "diff_size", work, [root], [])
        return _expect(result, requests.Measured).size

    async def usage(
        self,
        chain: tuple[Branch, ...],
        *,
        against: tuple[Branch, ...] | None = None,
        sync: bool = False,
    ) -> requests.Used:
        """Allocated bytes and inodes of the layer's own content; with `sync` that is synced first.

        `against` as in `diff`.
        """
        work = requests.Usage(chain, against, sync)
        root = self._content(chain[0]) if against is None else self.layout.diff
        return _expect(await self._run(chain[0].id, "usage", work, [root], []), requests.Used)

    async def look_into(self, chain: tuple[Branch, ...]) -> tuple[results.Problem, ...]:
        """What is wrong with the marks in the content of chain[0], and what aufs reads otherwise.

        Raises InternalError (EIO) and LimitExceeded.
        """
        work = requests.Read(chain)
        result = await self._run(chain[0].id, "check", work, [self.layout.diff], [])
        return _expect(result, requests.Reading).problems

    async def clone(self, id: str, staging: str) -> None:
        """Copy the content of a layer into the empty directory `staging` below the store's root.

        Regular files become hard links: replace them, never write to one.
        """
        root = self.layout.root
        if not staging.startswith(f"{root}/"):
            raise ValueError(f"{staging} is not in the store")
        work = requests.Clone(f"/diff/{id}", staging.removeprefix(root))
        _expect(await self._run(id, "clone", work, [root], []), requests.Cloned)

    async def squash(self, work: requests.Squash) -> None:
        """Merge a chain into `work.staging`, an empty directory given below the store's root.

        Raises NoSpace; then, and when cancelled, staging is to be thrown away.
        """
        result = await self._run(work.chain[0].id, "squash", work, [self.layout.root], [])
        _expect(result, requests.Cloned)

    async def convert(
        self, id: str, to: Dialect, parents: tuple[Branch, ...] | None = None
    ) -> bool:
        """Rewrite the layer's whiteouts; False if it was in that dialect already.

        `parents` are what it stands on, None if that cannot be known: those that hide nothing there
        are not written again.

        The caller sees to it that nobody uses the layer. Cancelled or killed it stays half done,
        is read correctly, and the next call finishes it. Raises LayerDamaged if the layer holds
        what the other dialect cannot say.
        """
        path = f"{self.layout.diff}/{id}"
        mounts = [path] if parents is None else [path, self.layout.diff]
        result = await self._run(id, "convert", requests.Convert(to, parents), mounts, [])
        return _expect(result, requests.Converted).converted

    async def staged_size(self, id: str, staging: str, parent: str) -> int:
        """As `diff_size`, of content `staging` that is to be a layer's, and is all that it shows.

        `parent` is the layer that it stands on, "" for none.
        """
        root = self.layout.root
        if not parent:
            own = requests.Measure((Branch(id, Dialect.NONE),), None)
            result = await self._run(id, "diff_size", own, [staging], [])
        else:
            chain = (Branch(staging.removeprefix(f"{root}/"), Dialect.NONE),)
            against = (Branch(f"diff/{parent}", Dialect.NONE),)
            work = requests.Measure(chain, against)
            result = await self._run(id, "diff_size", work, [root], [])
        return _expect(result, requests.Measured).size

    async def relabel(self, id: str, staging: str, label: str) -> int:
        """Put an SELinux label on every inode of the content `staging`; how many lacked it.

        Raises NoSpace; then, and when cancelled, staging is to be thrown away.
        """
        result = await self._run(id, "relabel", requests.Relabel(label), [staging], [])
        return _expect(result, requests.Relabelled).inodes

    def running(self) -> list[results.Job]:
        """The jobs that have a child now, and how far they are."""
        return [
            results.Job(job.id, job.kind, job.since, job.bytes, job.entries)
            for job in self.jobs.values()
        ]

    @property
    def waiting(self) -> int:
        """How many jobs wait for one that runs to end."""
        limiters = (self.slots, self.conversions)
        return sum(limiter.statistics().tasks_waiting for limiter in limiters)

    def _content(self, branch: Branch) -> str:
        return f"{self.layout.diff}/{branch.id}"

    async def _run(
        self, id: str, kind: str, work: requests.Work, mounts: Sequence[str], passed: Sequence[int]
    ) -> requests.Result:
        short = isinstance(work, requests.Convert | requests.Relabel)
        limiter = self.conversions if short else self.slots
        waiting = self.slots.statistics().tasks_waiting
        if limiter is self.slots and waiting >= self.max_waiting:
            raise Overloaded(f"{waiting} archive jobs wait already", limit=self.max_waiting)
        async with limiter:
            job = _Running(id, kind, time.time())
            key = object.__hash__(job)
            self.jobs[key] = job
            try:
                request = requests.Request(work, self.settings)
                try:
                    return await self._child(job, request, mounts, passed)
                except _NeverBegan:
                    # the child, or the whole fork server, was killed while it waited for a job
                    log.warning("archive process lost before it began", id=id, kind=kind)
                    return await self._child(job, request, mounts, passed)
            finally:
                del self.jobs[key]
                self.done[kind] += 1
                self.done_bytes[kind] += job.bytes
                self.done_entries[kind] += job.entries

    async def _child(
        self,
        job: _Running,
        request: requests.Request,
        mounts: Sequence[str],
        passed: Sequence[int],
    ) -> requests.Result:
        ours, theirs = socket.socketpair()
        with ours, ExitStack() as opened:
            with theirs:
                fds = [opened.enter_context(_cloned(path)) for path in mounts]
                while not self.server.hand_over(theirs):
                    assert self.server.channel is not None
                    await trio.lowlevel.wait_writable(self.server.channel)
            child = _Child(job, trio.socket.from_stdlib_socket(ours))
            try:
                await child.send(requests.encode(request) + b"\n", [*fds, *passed])
                # before the child does: the last who closes a detached mount waits for its unmount
                opened.close()
                return await child.result()
            except BaseException:
                with trio.CancelScope(shield=True):
                    await child.kill()
                raise
            finally:
                child.close()


@dataclass(slots=True)
class _Child:
    """The daemon's end of a job's socket."""

    job: _Running
    stream: trio.socket.SocketType
    # names the child for good; it comes with the first line
    pidfd: int = -1
    held: bytearray = field(default_factory=bytearray)
    # how much of that was looked through for the end of a line
    seen: int = 0

    async def send(self, line: bytes, fds: Sequence[int]) -> None:
        """Send the request."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        try:
            sent = await self.stream.sendmsg([line], ancillary)
            while sent < len(line):
                sent += await self.stream.send(line[sent:])
        except (BrokenPipeError, ConnectionResetError):
            raise _never_began(self.job) from None

    async def kill(self) -> None:
        """Kill the child, and wait until it is gone."""
        while self.pidfd < 0 and await self._receive():
            pass
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            await trio.lowlevel.wait_readable(self.pidfd)

    def close(self) -> None:
        """Let go of the child."""
        if self.pidfd >= 0:
            os.close(self.pidfd)

    async def result(self) -> requests.Result:
        """What the child results. Raises what it raised, and InternalError if it was killed."""
        while True:
            while (end := self.held.find(b"\n", self.seen)) < 0:
                self.seen = len(self.held)
                if not await self._receive():
                    raise _died(self.job) if self.pidfd >= 0 else _never_began(self.job)
            line = bytes(self.held[:end])
            del self.held[: end + 1]
            self.seen = 0
            reply: requests.Reply = requests.decode_reply(line)
            if isinstance(reply, requests.Progress):
                self.job.bytes, self.job.entries = reply.bytes, reply.entries
            elif isinstance(reply, requests.Failed):
                raise from_wire(reply.error)
            elif not isinstance(reply, requests.Started):
                return reply

    async def _receive(self) -> bool:
        """Read more of the replies; False if no more can come.

        Only the first line brings a descriptor. It is sent before the child has seen anything of a
        stranger's; what came later might name another process, and the kernel discards it here.
        """
        room = socket.CMSG_SPACE(array.array("i").itemsize) if self.pidfd < 0 else 0
        try:
            data, ancillary, _, _ = await self.stream.recvmsg(_LINE, room, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return False
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self.pidfd = array.array("i", payload)[0]
                self.job.pid = _pid_of(self.pidfd)
        self.held += data
        if len(self.held) > _REPLY_MAX:
            raise InternalError(f"the process of this {self.job.kind} does not stop talking")
        return bool(data)


@asynccontextmanager
async def open_jobs(
    layout: Layout,
    *,
    uid_maps: Sequence[IdMap] = (),
    gid_maps: Sequence[IdMap] = (),
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    max_jobs: int = 4,
    max_waiting: int = 256,
    stream_timeout: float = 0.0,
    sync: Literal["filesystem", "none"] = "filesystem",
    acls: bool = False,
    xattr_namespace: Literal["trusted", "user"] = "trusted",
    held: tuple[int, ...] = (),
    server: ForkServer | None = None,
) -> AsyncIterator[Jobs]:
    """Archive jobs over a store, `max_jobs` at a time; at the end all are killed.

    Call it from the main thread: the fork server ends with the thread that started it. `held` is
    for ForkServer; a `server` that is given is used, and left running.
    """
    settings = Settings(
        tuple(uid_maps), tuple(gid_maps), limits, sync, acls, xattr_namespace, stream_timeout
    )
    own = server or ForkServer(layout.private, held)
    own.start()
    try:
        yield Jobs(
            layout,
            settings,
            max_waiting,
            trio.CapacityLimiter(max_jobs),
            trio.CapacityLimiter(max_jobs),
            own,
        )
    finally:
        if server is None:
            own.stop()


@contextmanager
def _cloned(path: str) -> Iterator[int]:
    """A detached mount of a directory: not what is mounted in it, nor what it lies in."""
    flags = sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC | sc.AT_SYMLINK_NOFOLLOW
    fd = sc.open_tree(sc.AT_FDCWD, path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def _pid_of(pidfd: int) -> int:
    """The pid, as /proc shows it to us (proc_pid_fdinfo(5)). Reading this does not block."""
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("Pid:")), 0)


class _NeverBegan(InternalError):
    """The child was gone before it had the whole request: nothing was done."""


def _never_began(job: _Running) -> _NeverBegan:
    return _NeverBegan(f"the process of this {job.kind} was killed before it began", id=job.id)


def _died(job: _Running) -> InternalError:
    # the kernel's log names the pid if it was the memory that ran out
    return InternalError(f"process {job.pid} of this {job.kind} was killed", id=job.id)


T = TypeVar("T")


def _expect(result: requests.Result, kind: type[T]) -> T:
    if not isinstance(result, kind):
        raise InternalError(f"an archive job answered with {type(result).__name__}")
    return result
