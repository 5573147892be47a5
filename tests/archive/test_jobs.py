"""Jobs as processes: killed, cancelled, confined; their server, progress and descriptors."""

import contextlib
import os
import signal
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
import trio
import trio.testing

from aufsd.archive.fork import ForkServer
from aufsd.kernel import syscalls
from aufsd.store.dialect import Dialect
from aufsd_client.errors import (
    AufsdError,
    BadArchive,
    InternalError,
    Overloaded,
)
from tests.archive.running import (
    apply,
    children_of,
    descriptors,
    failure,
    pipe,
    stop,
    until_running,
)
from tests.archive.shelf import Shelf, open_shelf
from tests.archive.tars import entry, listing, tar

pytestmark = pytest.mark.mounts


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
