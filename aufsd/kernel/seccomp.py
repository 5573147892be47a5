"""A filter of system calls for this process and its children: those named are let through.

A short BPF program (Documentation/userspace-api/seccomp_filter.rst), compiled here: libseccomp has
no Python package that is kept on the registries. Every other call fails with EPERM, of which Python
makes a PermissionError, so what is missing is told and not killed. Kernels since 5.11 run it once
per call number and remember (seccomp_cache_prepare() in kernel/seccomp.c).
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Collection, Iterable, Iterator
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)

# <linux/prctl.h>, <linux/seccomp.h>, <linux/audit.h>
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_SECCOMP_RET_ALLOW: Final = 0x7FFF0000
_SECCOMP_RET_ERRNO: Final = 0x00050000
_AUDIT_ARCH_X86_64: Final = 0xC000003E
# <linux/bpf_common.h>: load a word of struct seccomp_data; compare; return
_LOAD: Final = 0x20
_EQUAL: Final = 0x15
_AT_LEAST: Final = 0x35
_ABOVE: Final = 0x25
_RETURN: Final = 0x06
_NUMBER: Final = 0
_ARCHITECTURE: Final = 4
_INSTRUCTION: Final = struct.Struct("=HBBI")

# arch/x86/entry/syscalls/syscall_64.tbl
NUMBERS: Final = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7,
    "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13,
    "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19,
    "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28,
    "dup": 32, "getitimer": 36, "setitimer": 38, "getpid": 39, "sendfile": 40, "sendto": 44,
    "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "exit": 60, "fcntl": 72,
    "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "getcwd": 79, "chdir": 80,
    "fchdir": 81, "rename": 82, "mkdir": 83, "rmdir": 84, "link": 86, "unlink": 87, "symlink": 88,
    "readlink": 89, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94,
    "umask": 95, "gettimeofday": 96, "getrlimit": 97, "getuid": 102, "getgid": 104,
    "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131, "mknod": 133,
    "statfs": 137, "fstatfs": 138, "gettid": 186, "setxattr": 188, "lsetxattr": 189,
    "fsetxattr": 190, "getxattr": 191, "lgetxattr": 192, "fgetxattr": 193, "listxattr": 194,
    "llistxattr": 195, "flistxattr": 196, "removexattr": 197, "lremovexattr": 198,
    "fremovexattr": 199, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217,
    "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "utimes": 235, "openat": 257, "mkdirat": 258,
    "mknodat": 259, "fchownat": 260, "futimesat": 261, "newfstatat": 262, "unlinkat": 263,
    "renameat": 264, "linkat": 265, "symlinkat": 266, "readlinkat": 267, "fchmodat": 268,
    "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "splice": 275,
    "utimensat": 280, "fallocate": 285, "dup3": 292, "preadv": 295, "pwritev": 296,
    "syncfs": 306, "renameat2": 316, "getrandom": 318, "membarrier": 324,
    "copy_file_range": 326, "preadv2": 327, "pwritev2": 328, "statx": 332, "rseq": 334,
    "openat2": 437, "faccessat2": 439, "fchmodat2": 452,
}  # fmt: skip


class _Program(ctypes.Structure):
    # struct sock_fprog
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def compiled(names: Collection[str]) -> bytes:
    """The program that lets these calls through, and fails all others with EPERM.

    Calls that are newer than the table do not exist, ENOSYS: then libc does without (runc does so).
    """
    numbers = sorted(NUMBERS[name] for name in names)
    rows: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        # another ABI numbers its calls otherwise: all of them are refused
        (_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _SECCOMP_RET_ERRNO | errno.EPERM),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for first, last in _ranges(numbers):
        rows += [
            (_AT_LEAST, 0, 2, first),
            (_ABOVE, 1, 0, last),
            (_RETURN, 0, 0, _SECCOMP_RET_ALLOW),
        ]
    rows += [
        (_ABOVE, 0, 1, max(NUMBERS.values())),
        (_RETURN, 0, 0, _SECCOMP_RET_ERRNO | errno.ENOSYS),
        (_RETURN, 0, 0, _SECCOMP_RET_ERRNO | errno.EPERM),
    ]
    return b"".join(_INSTRUCTION.pack(*row) for row in rows)


def _ranges(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    first = last = -1
    for number in numbers:
        if last >= 0 and number == last + 1:
            last = number
            continue
        if last >= 0:
            yield first, last
        first = last = number
    if last >= 0:
        yield first, last


def is_known() -> bool:
    """Whether the numbers above are this machine's."""
    return platform.machine() == "x86_64"


def install(program: bytes) -> None:
    """prctl(2), PR_SET_SECCOMP: from now on, and for good. Needs no_new_privs. Raises OSError."""
    made = _Program(len(program) // _INSTRUCTION.size, program)
    zero = ctypes.c_ulong(0)
    result = _libc.prctl(
        _PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(made), zero, zero
    )
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
