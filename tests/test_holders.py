"""Who keeps a union busy: each way of holding it, by a real process."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec import UNSET

from aufsd.kernel import syscalls
from aufsd.kernel.holders import _hidden, holders, in_kernel, look, may_hold
from aufsd.results import Holder
from tests.daemon import eventually

pytestmark = pytest.mark.mounts

HOLD = {
    "cwd": "os.chdir(target)",
    "root": "os.chroot(target)",
    "fd": "kept = open(f'{target}/file', 'rb')",
    "fd-of-directory": "kept = os.open(target, os.O_PATH)",
    "map": """
with open(f'{target}/file', 'rb') as file:
    kept = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    os.close(file.fileno() + 1)  # mmap keeps a duplicate, which would be a use of its own
""",
    "mount-namespace": f"""
syscalls.unshare({syscalls.CLONE_NEWNS})
syscalls.mount('none', '/', '', {syscalls.MS_REC | syscalls.MS_PRIVATE})
""",
    "cwd-of-a-thread": """
def stay():
    syscalls.unshare(syscalls.CLONE_FS)
    os.chdir(target)
    there.set()
    threading.Event().wait()
there = threading.Event()
threading.Thread(target=stay, daemon=True).start()
there.wait()
""",
    "fd-where-the-first-thread-has-ended": """
kept = open(f'{target}/file', 'rb')
def stay():
    while ' Z ' not in open(f'/proc/self/task/{os.getpid()}/stat').read():
        pass
    print('holding', flush=True)
    sys.stdin.read()
threading.Thread(target=stay).start()
ctypes.CDLL(None).pthread_exit(None)
""",
    "socket": "kept = socket.socket(socket.AF_UNIX); kept.bind(f'{target}/socket')",
    "socket-without-a-name": """
kept = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
kept.bind(f'{target}/socket')
os.unlink(f'{target}/socket')
""",
}
# where the use is not the name
USES = {
    "fd-of-directory": "fd",
    "cwd-of-a-thread": "cwd",
    "fd-where-the-first-thread-has-ended": "fd",
    "socket": "fd",
    "socket-without-a-name": "fd",
}
PROGRAM = """
import ctypes, mmap, os, socket, sys, threading
from aufsd.kernel import syscalls
target = sys.argv[1]
{hold}
print('holding', flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["same file system", "lower on tmpfs"])
def union(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A mounted overlay with `file` and `program` in its lower branch."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    lower = str(tmp_path / "lower")
    if request.param == "lower on tmpfs":
        syscalls.mount("none", lower, "tmpfs", 0, "size=16m")
    Path(lower, "file").write_bytes(b"content")
    shutil.copy("/bin/sleep", f"{lower}/program")
    target = str(tmp_path / "merged")
    data = f"lowerdir={lower},upperdir={tmp_path}/upper,workdir={tmp_path}/work,userxattr"
    syscalls.mount("none", target, "overlay", 0, data)
    yield target
    syscalls.umount2(target)
    if request.param == "lower on tmpfs":
        syscalls.umount2(lower)


@contextmanager
def holding(how: str, target: str) -> Iterator[int]:
    """A process that holds `target` in one way; its pid."""
    program = [sys.executable, "-c", PROGRAM.format(hold=HOLD[how]), target]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == b"holding\n"
        yield child.pid
        child.stdin.close()


def test_nobody_holds_a_union_that_nobody_uses(union: str) -> None:
    assert holders(union) == []


def test_nobody_holds_what_is_not_mounted(tmp_path: Path) -> None:
    assert holders(str(tmp_path)) == []


@pytest.mark.parametrize("how", HOLD)
def test_a_holder_is_named_with_its_use(how: str, union: str) -> None:
    with holding(how, union) as pid:
        found = holders(union)
    comm = os.path.basename(sys.executable)[:15]
    uses = [USES.get(how, how)]
    assert [(holder.pid, holder.comm, holder.uses) for holder in found] == [(pid, comm, uses)]
    assert found[0].sockets == ([f"{union}/socket"] if "socket" in how else UNSET)
    assert holders(union) == []


def test_a_program_run_from_the_union_holds_it(union: str) -> None:
    with subprocess.Popen([f"{union}/program", "1000"]) as child:
        # while it is being loaded it may wait for the disk, and then its maps are not read
        eventually(lambda: ") S " in Path(f"/proc/{child.pid}/stat").read_text())
        found = holders(union)
        child.kill()
    assert found == [Holder(child.pid, "program", ["exe", "map"])]


def test_ourselves_only_if_we_hold_it(union: str) -> None:
    with open(f"{union}/file", "rb"):
        assert [(holder.pid, holder.uses) for holder in holders(union)] == [(os.getpid(), ["fd"])]
    assert holders(union) == []


def test_uses_of_one_process_come_together_and_processes_by_pid(union: str) -> None:
    with holding("map", union) as first, holding("cwd", union) as second:
        assert [holder.pid for holder in holders(union)] == sorted((first, second))


def test_a_process_in_another_namespace_that_reaches_in_is_named(union: str) -> None:
    """Its copy of the mount has another id, and our umount2(2) alone does not end it."""
    both = f"{HOLD['mount-namespace']}\n{HOLD['fd']}"
    program = [sys.executable, "-c", PROGRAM.format(hold=both), union]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == b"holding\n"
        found = holders(union)
        child.stdin.close()
    assert [(holder.pid, holder.uses) for holder in found] == [
        (child.pid, ["fd", "mount-namespace"])
    ]


def is_busy(union: str) -> bool:
    """By the kernel's own word; what is not busy is unmounted and mounted no more."""
    try:
        syscalls.umount2(union)
    except OSError:
        return True
    return False


def test_a_descriptor_in_flight_is_told_of_whoever_may_get_it(union: str) -> None:
    """Nobody has it open; the receiving socket's queue keeps it, and does not tell what it is."""
    receiver, sender = socket.socketpair()
    with receiver, sender:
        with open(f"{union}/file", "rb") as file:
            socket.send_fds(sender, [b"x"], [file.fileno(), file.fileno()])
        assert holders(union) == []
        found = look(union, busy=is_busy(union))
        ours = [holder for holder in found.holders if holder.pid == os.getpid()]
        assert [(holder.uses, holder.hidden) for holder in ours] == [([], 2)]
        assert look(union, busy=False).holders == [], "of a mount that is not known to be busy"
        with open(f"{union}/file", "rb"):
            seen = look(union, busy=True).holders
            assert [(holder.pid, holder.uses) for holder in seen] == [(os.getpid(), ["fd"])]
        _, fds, _, _ = socket.recv_fds(receiver, 1, 2)
        for fd in fds:
            os.close(fd)
        assert os.getpid() not in [holder.pid for holder in may_hold()]


def test_what_the_kernel_itself_has_in_a_union_is_named(union: str, tmp_path: Path) -> None:
    os.mkdir(f"{union}/inside")
    syscalls.mount("none", f"{union}/inside", "tmpfs", 0)
    try:
        assert in_kernel(union) == [f"tmpfs mounted at {union}/inside"]
        found = look(union, busy=is_busy(union))
        assert (found.holders, len(found.kernel)) == ([], 1)
    finally:
        syscalls.umount2(f"{union}/inside")
    assert in_kernel(union) == []


@pytest.mark.root
def test_a_loop_device_of_a_file_in_a_union_is_named(union: str) -> None:
    os.truncate(f"{union}/file", 1 << 20)
    made = subprocess.run(
        ["losetup", "--find", "--show", f"{union}/file"], capture_output=True, text=True, check=True
    )
    device = made.stdout.strip()
    try:
        assert holders(union) == []
        assert in_kernel(union) == [f"{device} on {union}/file"]
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize(
    ("fdinfo", "count"),
    [
        ("pos:\t0\nflags:\t02\nmnt_id:\t10\nino:\t1\nscm_fds: 3\n", 3),
        ("pos:\t0\nmnt_id:\t10\n", 0),
        (
            "CqHead:\t0\nSQEs:\t0\nCQEs:\t0\nSqThread:\t-1\nUserFiles:\t3\n"
            "    0: file\n    1: <none>\n    2: other\nUserBufs:\t1\n    0: 0x7f0/4096\n",
            2,
        ),
    ],
    ids=["socket", "file", "io_uring"],
)
def test_what_fdinfo_tells_of_descriptors_that_are_not_shown(fdinfo: str, count: int) -> None:
    assert _hidden(fdinfo) == count
