"""Runs archive jobs for the daemon. Each is a child process, forked by the fork server.

The daemon opens the directories of a job as detached mounts (open_tree(2)) and sends descriptors,
because a child sees no paths of the host. If a job's socket ends without a result, its child was
killed.
"""

import fcntl
import os
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
from aufsd.archive.process import ArchiveProcess, NeverBegan, Running
from aufsd.archive.requests import Branch, Limits, Settings
from aufsd.archive.stuck import Stuck, is_file, stream_name, stuck_now
from aufsd.kernel import syscalls as sc
from aufsd.store.dialect import Dialect
from aufsd.store.idmap import IdMap
from aufsd.store.layout import Layout
from aufsd_client.errors import InternalError, Overloaded

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Jobs:
    """Runs archive jobs. Every method may raise Overloaded, and InternalError if the child dies.

    Cancelled while it waits for its turn, a job was not begun. Cancelled later, its child is
    killed. The call ends when the child has ended, or when it only waits in the kernel for its
    stream. What the child has written stays where it is.
    """

    layout: Layout
    settings: Settings
    max_waiting: int
    slots: trio.CapacityLimiter
    # of their own, so that no mount waits for somebody's slow stream
    conversions: trio.CapacityLimiter
    server: ForkServer
    jobs: dict[int, Running] = field(default_factory=dict)
    # processes of jobs that are over
    stuck: Stuck = field(default_factory=Stuck)
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
        for fd in passed:
            self.stuck.refuse_file(stream_name(fd))
        async with limiter:
            job = Running(id, kind, time.time())
            key = object.__hash__(job)
            self.jobs[key] = job
            try:
                request = requests.Request(work, self.settings)
                try:
                    return await self._child(job, request, mounts, passed)
                except NeverBegan:
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
        job: Running,
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
            file = next(filter(is_file, map(stream_name, passed)), "")
            child = ArchiveProcess(job, trio.socket.from_stdlib_socket(ours), file)
            try:
                await child.send(requests.encode(request) + b"\n", [*fds, *passed])
                # before the child does: the last who closes a detached mount waits for its unmount
                opened.close()
                return await child.result_in_time(self.settings.stream_timeout)
            except BaseException:
                with trio.CancelScope(shield=True):
                    if not await child.kill():
                        self.stuck.add(child.pidfd, stuck_now(job.id, job.kind, job.pid, file))
                raise
            finally:
                child.close()


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
    node_whiteouts: bool = False,
    held: tuple[int, ...] = (),
    server: ForkServer | None = None,
) -> AsyncIterator[Jobs]:
    """Archive jobs over a store, `max_jobs` at a time; at the end all are killed.

    Call it from the main thread: the fork server ends with the thread that started it. `held` is
    for ForkServer; a `server` that is given is used, and left running.
    """
    settings = Settings(
        tuple(uid_maps),
        tuple(gid_maps),
        limits,
        sync,
        acls,
        xattr_namespace,
        stream_timeout,
        node_whiteouts,
    )
    own = server or ForkServer(layout.private, held)
    own.start()
    jobs = Jobs(
        layout,
        settings,
        max_waiting,
        trio.CapacityLimiter(max_jobs),
        trio.CapacityLimiter(max_jobs),
        own,
    )
    try:
        yield jobs
    finally:
        if server is None:
            own.stop()
        if jobs.stuck.living():
            # a stuck process has these, too, and is no reason for the next daemon to wait
            for fd in held:
                fcntl.flock(fd, fcntl.LOCK_UN)
        jobs.stuck.close()


@contextmanager
def _cloned(path: str) -> Iterator[int]:
    """A detached mount of a directory: not what is mounted in it, nor what it lies in."""
    flags = sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC | sc.AT_SYMLINK_NOFOLLOW
    fd = sc.open_tree(sc.AT_FDCWD, path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


T = TypeVar("T")


def _expect(result: requests.Result, kind: type[T]) -> T:
    if not isinstance(result, kind):
        raise InternalError(f"an archive job answered with {type(result).__name__}")
    return result
