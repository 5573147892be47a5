"""Who keeps a union busy: each way of holding it, by a real process."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aufsd.kernel import syscalls
from aufsd.kernel.holders import holders
from aufsd.results import Holder

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
}
PROGRAM = """
import mmap, os, sys
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
    uses = ["fd" if how == "fd-of-directory" else how]
    assert [(holder.pid, holder.comm, holder.uses) for holder in found] == [(pid, comm, uses)]
    assert holders(union) == []


def test_a_program_run_from_the_union_holds_it(union: str) -> None:
    with subprocess.Popen([f"{union}/program", "1000"]) as child:
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
