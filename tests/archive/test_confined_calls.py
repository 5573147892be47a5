"""An archive child makes the system calls of files, and no other, whatever runs in it."""

import errno
import os
import socket
from collections.abc import Callable

import pytest

from aufsd.archive import errnos
from aufsd.kernel import seccomp, syscalls

pytestmark = [
    pytest.mark.mounts,
    pytest.mark.skipif(not seccomp.is_known(), reason="the filter is for x86_64"),
]

NOT_FOR_IT: dict[str, Callable[[], object]] = {
    "mount": lambda: syscalls.mount("none", "/", "tmpfs", 0),
    "umount2": lambda: syscalls.umount2("/"),
    "open_tree": lambda: syscalls.open_tree(syscalls.AT_FDCWD, "/", syscalls.OPEN_TREE_CLONE),
    "move_mount": lambda: syscalls.move_mount(0, "", syscalls.AT_FDCWD, "/", 4),
    "mount_setattr": lambda: syscalls.mount_setattr(syscalls.AT_FDCWD, "/", 0),
    "pivot_root": lambda: syscalls.pivot_root("/", "/"),
    "unshare": lambda: syscalls.unshare(syscalls.CLONE_NEWUSER),
    "setns": lambda: syscalls.setns(0, 0),
    "chroot": lambda: os.chroot("/"),
    "socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "execve": lambda: os.execv("/bin/true", ["true"]),
    "fork": os.fork,
    "kill": lambda: os.kill(os.getppid(), 0),
    "memfd_create": lambda: os.memfd_create("x"),
    "prctl": lambda: syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1),
}


def filtered(work: Callable[[], object], program: bytes) -> int:
    """What this does behind the filter, in a process of its own: 0, or the errno."""
    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
            seccomp.install(program)
            work()
            status = 0
        except OSError as error:
            status = error.errno or 254
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("call", NOT_FOR_IT)
def test_no_other_call_is_let_through(call: str) -> None:
    """Also to a child that keeps CAP_SYS_ADMIN for overlayfs's marks."""
    assert filtered(NOT_FOR_IT[call], seccomp.compiled(seccomp.NUMBERS)) == errno.EPERM


def test_what_is_refused_is_a_sentence_and_no_incident() -> None:
    refused = OSError(errno.EPERM, os.strerror(errno.EPERM))
    assert errnos.answer(refused, b"x") is not None


def test_an_open_file_can_still_be_read() -> None:
    assert filtered(lambda: os.listdir("/"), seccomp.compiled(seccomp.NUMBERS)) == 0
