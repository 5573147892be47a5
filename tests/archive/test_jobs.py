"""Jobs as processes: limits, a full disk, killed and cancelled children, progress, descriptors."""

import contextlib
import os
import signal
import stat
import struct
import subprocess
import tempfile
from collections.abc import Awaitable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
import zstandard

from aufsd.archive.fork import ForkServer
from aufsd.archive.requests import Limits
from aufsd.kernel import syscalls
from aufsd.results import Streamed
from aufsd.store.dialect import WITH_MARKS, Dialect
from aufsd.store.idmap import IdMap
from aufsd_client.errors import (
    AufsdError,
    BadArchive,
    InternalError,
    LayerDamaged,
    LimitExceeded,
    NoSpace,
    Overloaded,
)
from tests.archive.shelf import Shelf, needs_root, open_shelf, snapshot
from tests.archive.tars import directory, entry, link, listing, tar
from tests.daemon import eventually

pytestmark = pytest.mark.mounts


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


async def test_a_killed_child_is_an_error_and_nothing_stays(shelf: Shelf) -> None:
    shelf.add("a")
    before = descriptors()
    with pipe() as (r, w):
        os.write(w, tar(entry("x", b"y" * 2000))[:1500])
        found: list[AufsdError] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(failure, apply(shelf, r), found)
            os.kill(await until_running(shelf), signal.SIGKILL)
    assert isinstance(found[0], InternalError)
    assert "killed" in found[0].message
    assert descriptors() == before
    assert shelf.jobs.running() == []


async def test_a_cancelled_job_is_over_when_the_call_ends(shelf: Shelf) -> None:
    shelf.add("a")
    pids: list[int] = []
    with pipe() as (r, w):
        os.write(w, tar(entry("x", b"y" * 2000))[:1500])
        before = descriptors()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def cancel() -> None:
                    pids.append(await until_running(shelf))
                    scope.cancel()

                nursery.start_soon(cancel)
                await apply(shelf, r)
        assert scope.cancelled_caught
        # not even a zombie holds the staging directory
        assert not os.path.exists(f"/proc/{pids[0]}/cwd") or not os.access(
            f"/proc/{pids[0]}/cwd", os.F_OK
        )
        assert descriptors() == before


async def test_a_diff_that_nobody_reads_can_be_cancelled(shelf: Shelf) -> None:
    at = shelf.add("a")
    (at / "big").write_bytes(bytes(20_000_000))
    with pipe() as (_, w), trio.move_on_after(0.3) as scope:
        await shelf.jobs.diff(shelf.chain("a"), w)
    assert scope.cancelled_caught
    assert shelf.jobs.running() == []


async def with_one_file(shelf: Shelf) -> "subprocess.Popen[bytes]":
    """Have a layer `a` that holds `x`; the fork server that was used."""
    shelf.add("a")
    await shelf.apply(tar(entry("x")), "a")
    process = shelf.jobs.server.process
    assert process is not None
    return process


async def test_a_fork_server_that_died_is_started_again(tmp_path: Path) -> None:
    async with open_shelf(tmp_path) as shelf:
        process = await with_one_file(shelf)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        stream = await shelf.diff("a")
        assert [member.name for member in listing(stream)] == [".", "x"]


async def test_a_server_whose_children_never_live_gives_up_and_another_is_started(
    tmp_path: Path,
) -> None:
    """It forked for ever, and a job that waited for a child was never answered."""
    async with open_shelf(tmp_path) as shelf:
        process = await with_one_file(shelf)
        (first,) = children_of(process.pid)
        with trio.fail_after(30):
            while process.poll() is None:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    for spare in children_of(first):
                        os.kill(spare, signal.SIGKILL)
                await trio.sleep(0.001)
        assert [member.name for member in listing(await shelf.diff("a"))] == [".", "x"]


async def test_a_job_that_no_child_began_is_given_to_another(tmp_path: Path) -> None:
    async with open_shelf(tmp_path) as shelf:
        process = await with_one_file(shelf)
        (first,) = children_of(process.pid)
        stop(first)
        for spare in children_of(first):
            stop(spare)
        async with trio.open_nursery() as nursery:

            async def diff() -> None:
                stream = await shelf.diff("a")
                assert [member.name for member in listing(stream)] == [".", "x"]

            nursery.start_soon(diff)
            while not shelf.jobs.jobs:
                await trio.lowlevel.checkpoint()
            # the job waits in line with its request sent
            await trio.testing.wait_all_tasks_blocked()
            process.kill()


async def test_children_end_with_their_server(tmp_path: Path) -> None:
    async with open_shelf(tmp_path) as shelf:
        shelf.add("a")
        found: list[AufsdError] = []
        with pipe() as (r, _):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(failure, apply(shelf, r), found)
                await until_running(shelf)
                assert shelf.jobs.server.process is not None
                shelf.jobs.server.process.kill()
        assert "killed" in found[0].message


async def test_jobs_beyond_the_limit_wait_and_then_are_refused(
    tmp_path: Path, server: ForkServer
) -> None:
    async with open_shelf(tmp_path, server, max_jobs=1, max_waiting=2) as shelf:
        shelf.add("a")
        with pipe() as (r, w):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(apply, shelf, r)
                await until_running(shelf)
                for _ in range(2):
                    nursery.start_soon(shelf.jobs.diff_size, shelf.chain("a"))
                while shelf.jobs.slots.statistics().tasks_waiting < 2:
                    await trio.sleep(0.005)
                with pytest.raises(Overloaded):
                    await shelf.jobs.diff_size(shelf.chain("a"))
                # a conversion is part of a mount, and does not stand in line with archives
                assert not await shelf.jobs.convert("a", Dialect.AUFS)
                os.write(w, tar(entry("x")))
                os.close(w)


async def test_progress_is_told_while_a_job_runs(shelf: Shelf) -> None:
    shelf.add("a")
    stream = tar(entry("x", b"y"), entry("big", bytes(40_000_000)))
    with pipe() as (r, w):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(apply, shelf, r)
            await until_running(shelf)
            for at in range(0, len(stream), 200_000):
                await trio.to_thread.run_sync(os.write, w, stream[at : at + 200_000])
                [job] = shelf.jobs.running()
                if job.entries:
                    break
                await trio.sleep(0.01)
            assert (job.id, job.kind, job.entries) == ("a", "apply_diff", 2)
            assert 100_000 < job.bytes <= at + 200_000
            await trio.to_thread.run_sync(os.write, w, stream[at + 200_000 :])
            os.close(w)


@needs_root
@pytest.mark.parametrize("fs", ["tmpfs", pytest.param("ext4", marks=pytest.mark.ext4)])
async def test_a_full_disk_is_no_space(tmp_path: Path, server: ForkServer, fs: str) -> None:
    root = tmp_path / "store"
    root.mkdir()
    if fs == "tmpfs":
        syscalls.mount("none", str(root), "tmpfs", 0, "size=1m")
    else:
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(8 << 20)
        _run("mkfs.ext4", "-q", "-N", "64", str(image))
        _run("mount", "-o", "loop", str(image), str(root))
    try:
        async with open_shelf(root, server) as shelf:
            shelf.add("a")
            with pytest.raises(NoSpace):
                await shelf.apply(tar(entry("big", bytes(9_000_000))), "a")
            (shelf.path("a") / "big").unlink()
            if fs == "ext4":
                with pytest.raises(NoSpace):
                    await shelf.apply(tar(*(entry(f"f{n}") for n in range(100))), "a")
    finally:
        syscalls.umount2(str(root))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


# --- limits -------------------------------------------------------------------------------------


async def test_bytes_and_entries_are_limited(tmp_path: Path, server: ForkServer) -> None:
    limits = Limits(bytes=1000, entries=3, depth=4)
    async with open_shelf(tmp_path, server, limits=limits) as shelf:
        fits = tar(entry("a", b"x" * 400), entry("b", b"x" * 600), entry("c"))
        shelf.add("ok")
        assert (await shelf.apply(fits, "ok")).size == 1000
        for number, stream in enumerate(
            (
                tar(entry("a", b"x" * 1001)),
                tar(entry("a", b"x" * 500), entry("b", b"x" * 501)),
                tar(*(entry(str(n)) for n in range(4))),
                tar(entry("a/b/c/d")),  # three directories that it implies
                tar(entry("a"), link("b", "a"), entry(".wh.x"), entry("y")),
                tar(entry("a/../1/2/3/4/5")),
                tar(entry("a", b"x" * 999), entry("a", b"x" * 1001)),
            )
        ):
            shelf.add(str(number))
            with pytest.raises(LimitExceeded):
                await shelf.apply(stream, str(number))


async def test_limits_count_what_the_layer_holds_in_the_end(
    tmp_path: Path, server: ForkServer
) -> None:
    async with open_shelf(tmp_path, server, limits=Limits(bytes=1000, entries=2)) as shelf:
        shelf.add("a")
        stream = tar(entry("a", b"x" * 900), entry("b", b"x" * 100))
        assert (await shelf.apply(stream, "a")).size == 1000
        # each replaces what was there
        assert (await shelf.merge(stream, "a")).size == 1000
        assert (await shelf.merge(tar(entry("a", b"y" * 800)), "a")).size == 900
        with pytest.raises(LimitExceeded):
            await shelf.merge(tar(entry("b", b"y" * 201)), "a")
        with pytest.raises(LimitExceeded):
            await shelf.merge(tar(entry("c")), "a")


async def test_a_sparse_file_counts_with_its_size(tmp_path: Path, server: ForkServer) -> None:
    async with open_shelf(tmp_path, server, limits=Limits(bytes=1 << 20)) as shelf:
        shelf.add("a")
        records = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": ""}
        with pytest.raises(LimitExceeded):
            await shelf.apply(tar(entry("x", pax_headers=records)), "a")


async def test_a_decompression_bomb_meets_the_limit_and_flat_memory(
    tmp_path: Path, server: ForkServer
) -> None:
    bomb = zstandard.ZstdCompressor().compress(tar(entry("x", bytes(300 << 20))))
    assert len(bomb) < 100_000
    async with open_shelf(tmp_path, server, limits=Limits(bytes=200 << 20)) as shelf:
        shelf.add("a")
        with pytest.raises(LimitExceeded):
            await shelf.apply(bomb, "a")


# --- owners -------------------------------------------------------------------------------------

MAPS = (IdMap(0, 100_000, 1000), IdMap(1000, 1_000_000, 1))


@needs_root
async def test_owners_are_mapped_both_ways_and_whiteouts_are_not(
    tmp_path: Path, server: ForkServer
) -> None:
    async with open_shelf(tmp_path, server, uid_maps=MAPS, gid_maps=MAPS) as shelf:
        stream = tar(
            directory(".", mode=0o755),
            entry(".wh.gone"),
            directory("d"),
            entry("d/.wh..wh..opq"),
            entry("one", uid=999, gid=1000),
            entry("zero"),
        )
        for dialect in WITH_MARKS:
            id = str(dialect)
            at = shelf.add(id, dialect)
            await shelf.apply(stream, id)
            found = {name: (e.uid, e.gid) for name, e in snapshot(at).items()}
            assert found[b"one"] == (100_999, 1_000_000)
            assert found[b"zero"] == found[b"d"] == found[b"."] == (100_000, 100_000)
            if dialect is Dialect.AUFS:
                assert found[b".wh.gone"] == found[b"d/.wh..wh..opq"] == (0, 0)
            members = listing(await shelf.diff(id))
            assert [(m.name, m.uid, m.gid) for m in members] == [
                (".", 0, 0),
                (".wh.gone", 0, 0),
                ("d", 0, 0),
                ("d/.wh..wh..opq", 0, 0),
                ("one", 999, 1000),
                ("zero", 0, 0),
            ]


@needs_root
async def test_an_owner_without_a_counterpart_is_an_error(
    tmp_path: Path, server: ForkServer
) -> None:
    async with open_shelf(tmp_path, server, uid_maps=MAPS, gid_maps=MAPS) as shelf:
        at = shelf.add("a")
        with pytest.raises(BadArchive, match="user 1001"):
            await shelf.apply(tar(entry("x", uid=1001)), "a")
        (at / "x").unlink()
        os.chown(at, 100_000, 100_000)
        (at / "y").touch()
        with pytest.raises(LayerDamaged, match="y belongs to user 0"):
            await shelf.diff("a")


@needs_root
async def test_a_capability_belongs_to_the_root_of_the_map(
    tmp_path: Path, server: ForkServer
) -> None:
    """Without the id of that root it would count for nobody (moby 95eb490780 is the way back)."""
    v2 = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
    stream = tar(
        directory("."), entry("x", pax_headers={"SCHILY.xattr.security.capability": v2.decode()})
    )
    async with open_shelf(tmp_path, server, uid_maps=MAPS, gid_maps=MAPS) as shelf:
        at = shelf.add("a")
        await shelf.apply(stream, "a")
        value = os.getxattr(at / "x", "security.capability")
        assert value == struct.pack("<IIIIII", 0x03000001, 1 << 13, 0, 0, 0, 100_000)
        member = listing(await shelf.diff("a"))[1]
        assert member.pax_headers["SCHILY.xattr.security.capability"].encode() == v2


@needs_root
async def test_acls_travel_if_asked_for(tmp_path: Path, server: ForkServer) -> None:
    def acl(user: int) -> bytes:
        rows = ((1, 7, -1), (2, 4, user), (4, 5, -1), (16, 5, -1), (32, 0, -1))
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *row) for row in rows)

    name = "system.posix_acl_access"
    async with open_shelf(tmp_path / "1", server, acls=True, uid_maps=MAPS, gid_maps=MAPS) as shelf:
        at = shelf.add("a")
        os.chown(at, 100_000, 100_000)
        (at / "x").touch()
        (at / "none").touch()
        os.chown(at / "x", 100_000, 100_000)
        os.chown(at / "none", 100_000, 100_000)
        os.setxattr(at / "x", name, acl(100_005))
        os.setxattr(at, "system.posix_acl_default", acl(100_006))
        (at / "d").mkdir()
        os.chown(at / "d", 100_000, 100_000)
        stream = await shelf.diff("a")
        shelf.add("b")
        await shelf.apply(stream, "b")
        assert os.getxattr(shelf.path("b") / "x", name) == acl(100_005)
        assert snapshot(shelf.path("b")) == snapshot(at)
        assert await shelf.diff("b") == stream
    async with open_shelf(tmp_path / "2", server) as plain:
        plain.add("c")
        warnings = (await plain.apply(stream, "c")).warnings
        assert len(warnings) == 4
        assert name not in os.listxattr(plain.path("c") / "x")
        assert b"posix_acl" not in await plain.diff("c")


# --- memory -------------------------------------------------------------------------------------


async def test_memory_stays_flat_whatever_the_size(shelf: Shelf) -> None:
    """Two gigabytes both ways; nothing of it passes through this process."""
    size = 2 << 30
    at = shelf.add("a")
    with (at / "huge").open("wb") as file:
        for offset in range(0, size, size // 8):
            os.pwrite(file.fileno(), os.urandom(1 << 20), offset)
        file.truncate(size)
    shelf.add("b")
    before = _begin_peak()
    peaks: list[int] = []
    with pipe() as (r, w):
        async with trio.open_nursery() as nursery:

            async def pack() -> None:
                await shelf.jobs.diff(shelf.chain("a"), w)
                os.close(w)

            async def watch() -> None:
                while True:
                    for pid in processes(shelf.jobs.server):
                        with contextlib.suppress(OSError):
                            peaks.append(_peak(pid))
                    await trio.sleep(0.02)

            nursery.start_soon(pack)
            nursery.start_soon(watch)
            result = await apply(shelf, r, "b")
            nursery.cancel_scope.cancel()
    assert result.size == size
    assert _peak(os.getpid()) - before < 32 << 10
    assert shelf.jobs.server.process is not None
    assert max(peaks) - _peak(shelf.jobs.server.process.pid) < 32 << 10
    assert (shelf.path("b") / "huge").stat().st_blocks * 512 < 64 << 20, "holes are holes again"


def _begin_peak() -> int:
    """Forget the peak that this process had: it is what it holds now, in KiB (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak(os.getpid())


def _peak(pid: int) -> int:
    """Peak resident size of a process in KiB."""
    with open(f"/proc/{pid}/status") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("VmHWM")), 0)


RESTRICTED = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC


async def test_the_child_has_no_privilege_to_spare(shelf: Shelf) -> None:
    """What the kernel says of a child in the middle of a job."""
    shelf.add("a")
    with pipe() as (r, w):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(apply, shelf, r)
            pid = await until_running(shelf)
            while int(_status(pid)["CapEff"], 16) & 1 << syscalls.CAP_SYS_ADMIN:
                await trio.sleep(0.005)
            found = _status(pid)
            assert found["NoNewPrivs"] == "1"
            held = int(found["CapEff"], 16)
            assert held == sum(1 << cap for cap in (0, 1, 3, 4, 27, 31))
            assert found["CapEff"] == found["CapPrm"]
            assert int(found["CapInh"], 16) == 0
            assert Path(f"/proc/{pid}/mountinfo").read_text() == ""
            flags = os.statvfs(f"/proc/{pid}/root").f_flag
            assert flags & RESTRICTED == RESTRICTED
            fds = sorted(os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd"))
            assert not [fd for fd in fds if str(shelf.layout.root) in fd and "diff" not in fd]
            for kind in ("mnt", "net", "ipc", "pid"):
                own = os.readlink(f"/proc/{pid}/ns/{kind}")
                assert own != os.readlink(f"/proc/self/ns/{kind}")
            os.write(w, tar(entry("x")))
            os.close(w)


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


async def test_a_layer_is_read_through_a_read_only_mount(shelf: Shelf) -> None:
    at = shelf.add("a")
    (at / "x").write_bytes(b"x" * 2_000_000)
    os.utime(at / "x", (0, 0))
    with pipe() as (r, w):
        async with trio.open_nursery() as nursery:

            async def diff() -> None:
                await shelf.jobs.diff(shelf.chain("a"), w)
                os.close(w)

            nursery.start_soon(diff)
            pid = await until_running(shelf)
            while not os.statvfs(f"/proc/{pid}/root").f_flag & os.ST_RDONLY:
                await trio.sleep(0.005)
            await trio.to_thread.run_sync(_drain, r)
    assert (at / "x").stat().st_atime == 0
    assert stat.S_ISREG((at / "x").stat().st_mode)


def _drain(fd: int) -> None:
    while os.read(fd, 1 << 20):
        pass


async def test_no_descriptor_is_left_over(shelf: Shelf) -> None:
    shelf.add("a")
    await shelf.apply(tar(entry("x")), "a")
    before = descriptors()
    for _ in range(3):
        await shelf.diff("a")
        with pytest.raises(BadArchive):
            await shelf.apply(b"x", "a")
        with contextlib.suppress(OSError):
            await shelf.jobs.diff_size(shelf.chain("a"), against=shelf.chain("a"))
    assert descriptors() == before
    with tempfile.TemporaryFile() as file:
        await shelf.jobs.diff(shelf.chain("a"), file.fileno())
