"""Who uses a layer is named wherever a call is refused; a process's references end with it."""

import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from aufsd import results
from aufsd.active import clearing
from aufsd.active.processes import ended
from aufsd.driver import Driver
from aufsd.kernel import syscalls
from aufsd.kernel.peer import process
from aufsd_client import Client, errors
from tests import driving
from tests.archives import tar
from tests.daemon import Daemon, eventually
from tests.driving import TOP, opened

pytestmark = pytest.mark.service


@pytest.fixture
def mounted(served: Daemon, client: Client) -> str:
    """`top` on `middle` on `base`, mounted by us; its path."""
    for id, parent in (("base", ""), ("middle", "base"), ("top", "middle")):
        client.create(id, parent=parent)
    return client.get("top").path


@contextmanager
def holding(served: Daemon, id: str) -> Iterator[int]:
    """A process with a `process` reference to a layer; its pid. It ends with the block."""
    script = (
        "import sys; from aufsd_client import Client\n"
        f"client = Client({served.socket!r})\n"
        f"client.get({id!r}, hold='process'); print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        try:
            yield holder.pid
        finally:
            holder.kill()


def named(error: errors.AufsdError) -> dict[int, list[str]]:
    """The pids that an error names, and by what they use the mount."""
    holders = error.data["holders"]
    assert isinstance(holders, list)
    return {each["pid"]: each.get("uses", []) for each in holders}


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.apply_diff("top", tar({})),
        lambda client: client.convert("top", "aufs"),
        lambda client: client.apply_diff("base", tar({})),
    ],
    ids=["apply_diff", "convert", "of what it stands on"],
)
def test_who_counted_a_mount_and_who_has_it_open_are_named(
    served: Daemon, client: Client, mounted: str, call: Callable[[Client], object]
) -> None:
    with (
        holding(served, "top") as counted,
        subprocess.Popen(["sleep", "1000"], cwd=mounted) as inside,
        subprocess.Popen(["unshare", "--mount", "sleep", "1000"]) as copy,
    ):
        try:
            eventually(lambda: Path(f"/proc/{copy.pid}/comm").read_text() == "sleep\n")
            with pytest.raises(errors.LayerInUse) as caught:
                call(client)
            assert caught.value.data["layers"] == ["top"]
            found = named(caught.value)
            assert found[counted] == []
            assert found[inside.pid] == ["cwd"]
            assert found[copy.pid] == ["mount-namespace"]
        finally:
            inside.kill()
            copy.kill()


def test_a_put_that_would_take_anothers_reference_names_whose(
    served: Daemon, client: Client, mounted: str
) -> None:
    with holding(served, "top") as pid:
        client.put("top")
        with pytest.raises(errors.LayerInUse) as caught:
            client.put("top")
        assert set(named(caught.value)) == {pid}
        assert client.holders("top").holders == []
    eventually(lambda: client.mounts().mounts == [])


def test_an_unmount_that_stays_busy_names_who_maps_a_file(
    served: Daemon, client: Client, mounted: str
) -> None:
    Path(mounted, "file").write_bytes(b"x" * 4096)
    script = (
        "import mmap, os, sys\n"
        "with open(sys.argv[1], 'rb') as file:\n"
        "    kept = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "    os.close(file.fileno() + 1)\n"
        "print('mapped', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, f"{mounted}/file"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"mapped\n"
        with pytest.raises(errors.UnmountBusy) as caught:
            client.put("top")
        assert named(caught.value) == {holder.pid: ["map"]}
        (check,) = [each for each in client.health().checks if each.name == "mounts"]
        assert (check.status, "top" in check.detail) == ("degraded", True)
        holder.kill()
    assert client.put("top").mounted is False
    assert client.health().status == "ok"


def test_a_socket_bound_in_a_mount_is_named_with_its_path(client: Client, mounted: str) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{mounted}/socket")
        with pytest.raises(errors.UnmountBusy, match=rf"\({os.getpid()}\)") as caught:
            client.put("top")
        assert caught.value.data["holders"] == [
            {
                "pid": os.getpid(),
                "comm": Path("/proc/self/comm").read_text().rstrip(),
                "uses": ["fd"],
                "sockets": [f"{mounted}/socket"],
            }
        ]
        (holder,) = client.holders("top").holders
        assert holder.sockets == [f"{mounted}/socket"]
    assert not client.put("top").mounted


def test_a_descriptor_in_flight_and_what_the_kernel_has_are_told(
    client: Client, mounted: str
) -> None:
    Path(mounted, "file").touch()
    receiver, sender = socket.socketpair()
    with receiver, sender:
        with open(f"{mounted}/file", "rb") as file:
            socket.send_fds(sender, [b"x"], [file.fileno()])
        with pytest.raises(errors.UnmountBusy, match="perhaps by a descriptor on its way to"):
            client.put("top")
        found = [each for each in client.holders("top").holders if each.pid == os.getpid()]
        assert [(each.uses, each.hidden) for each in found] == [([], 1)]
    os.mkdir(f"{mounted}/inside")
    syscalls.mount("none", f"{mounted}/inside", "tmpfs", 0)
    try:
        with pytest.raises(errors.UnmountBusy, match=f"tmpfs mounted at {mounted}/inside"):
            client.put("top")
        inside = [f"tmpfs mounted at {mounted}/inside"]
        assert client.holders("top").kernel == inside
        assert [each.kernel for each in client.cleanup().failed] == [inside]
        with pytest.raises(errors.UnmountBusy, match="tmpfs mounted at"):
            client.remove("top", force=True)
        assert os.path.ismount(f"{mounted}/inside")
    finally:
        syscalls.umount2(f"{mounted}/inside")
    assert not client.put("top").mounted


async def test_a_busy_mount_goes_in_the_background_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clearing, "BUSY_RETRY", 0.01)
    async with opened(tmp_path) as driver:
        got = await driving.get(driver, TOP)
        with open(f"{got.path}/file", "rb"):
            with pytest.raises(errors.UnmountBusy):
                await driving.put(driver, TOP)
            tries = driver.active.counters.busy_retries
            with trio.fail_after(30):
                while driver.active.counters.busy_retries == tries:
                    await trio.sleep(0.01)
            assert driver.active.table.entries[TOP].references == ()
            assert os.path.ismount(got.path), "it is never detached"
        with trio.fail_after(30):
            while TOP in driver.active.table.entries:
                await trio.sleep(0.01)
        assert not os.path.ismount(got.path)
        assert driver.health().status == "ok"


async def test_a_pid_that_went_to_another_process_is_not_waited_for() -> None:
    """As after a restart: the journal has the pid and when its process began."""
    with subprocess.Popen(["sleep", "1000"]) as child:
        _, start = process(child.pid)
        with trio.fail_after(30):
            await ended(child.pid, start + 1)
        assert child.poll() is None
        with trio.move_on_after(0.05) as scope:
            await ended(child.pid, start)
        assert scope.cancelled_caught
        child.kill()
        with trio.fail_after(30):
            await ended(child.pid, start)


async def test_without_a_descriptor_left_a_process_that_lives_is_not_taken_for_ended() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    over = trio.Event()

    async def wait(pid: int, start: int) -> None:
        await ended(pid, start)
        over.set()

    with sleeping() as child:
        _, start = process(child.pid)
        async with trio.open_nursery() as nursery:
            for left in (0, 1):
                # none for /proc, or none for that beside the pidfd
                taken = take_all_descriptors()
                try:
                    for fd in taken[:left]:
                        os.close(fd)
                    nursery.start_soon(wait, child.pid, start)
                    await trio.testing.wait_all_tasks_blocked()
                    assert not over.is_set()
                finally:
                    for fd in taken[left:]:
                        os.close(fd)
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            child.kill()
            with trio.fail_after(30):
                await over.wait()


def take_all_descriptors() -> list[int]:
    """All that a limit just above those in use leaves; the limit is the caller's to lift."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    taken: list[int] = []
    with suppress(OSError):
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    return taken


@contextmanager
def sleeping(directory: str = "/") -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, in a directory; it ends with the block."""
    with subprocess.Popen(["sleep", "1000"], cwd=directory) as child:
        try:
            yield child
        finally:
            child.kill()


@contextmanager
def copying() -> Iterator[subprocess.Popen[bytes]]:
    """A process in a mount namespace of its own, with copies of all that is mounted now."""
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", "echo copied; exec sleep 1000"],
        stdout=subprocess.PIPE,
    ) as copy:
        assert copy.stdout is not None
        assert copy.stdout.readline() == b"copied\n"
        try:
            yield copy
        finally:
            copy.kill()


async def test_a_get_waits_for_a_copy_of_the_last_mount_that_is_soon_gone(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver:
        await driving.get(driver, TOP)
        with copying() as copy:
            await driving.put(driver, TOP)
            got: list[results.Got] = []

            async def get() -> None:
                got.append(await driving.get(driver, TOP))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(get)
                while not driver.active.counters.busy_mounts:
                    await trio.sleep(0.01)
                copy.kill()
                copy.wait()
        assert [each.references for each in got] == [1]


@pytest.mark.parametrize("lasting", ["a copy in another namespace", "a detached mount"])
async def test_who_has_the_last_mount_of_a_layer_is_named_by_a_get(
    tmp_path: Path, lasting: str
) -> None:
    async with opened(tmp_path) as driver:
        path = (await driving.get(driver, TOP)).path
        if lasting == "a detached mount":
            with sleeping(path) as holder:
                syscalls.umount2(path, syscalls.MNT_DETACH)
                await _refused(driver, holder.pid, "sleep", "cwd")
        else:
            with copying() as holder:
                await driving.put(driver, TOP)
                await _refused(driver, holder.pid, "sleep", "mount-namespace")
        assert (await driving.get(driver, TOP)).mounted


async def _refused(driver: Driver, pid: int, comm: str, use: str) -> None:
    eventually(lambda: Path(f"/proc/{pid}/comm").read_text() == f"{comm}\n")
    with pytest.raises(errors.MountFailed, match=rf"{comm} \({pid}\)") as caught:
        await driving.get(driver, TOP)
    assert caught.value.data["errno"] == "EBUSY"
    assert named(caught.value) == {pid: [use]}


async def test_who_holds_a_mount_is_looked_for_in_a_thread_of_its_own(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver:
        path = (await driving.get(driver, TOP)).path
        go_on = threading.Event()
        async with trio.open_nursery() as nursery:
            # whoever looks has to wait, and nobody else
            nursery.start_soon(driver.active.scans.run, go_on.wait)
            await trio.testing.wait_all_tasks_blocked()
            try:
                with open(f"{path}/file", "rb"):
                    async with trio.open_nursery() as putting:
                        putting.start_soon(driving.put, driver, TOP)
                        with trio.fail_after(30):
                            while driver.active.scans.waiting < 1:
                                await trio.sleep(0.01)
                        putting.cancel_scope.cancel()
                nursery.start_soon(driver.holders, TOP)
                with trio.fail_after(30):
                    await driver.active.prove_alive()
                    assert (await driving.get(driver, TOP)).references == 1
                    assert not (await driving.put(driver, TOP)).references
            finally:
                go_on.set()
