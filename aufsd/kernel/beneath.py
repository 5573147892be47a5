"""Opens paths beneath a directory: without symlinks, other mounts, or `..` above it.

openat2(2) does it in one call (Linux 5.6). If the kernel or a container's filter refuses that call,
each component is opened by itself, and its mount is compared with that of the directory.
"""

import errno
import os
from typing import Final

from aufsd.kernel import syscalls

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RESOLVE: Final = (
    syscalls.RESOLVE_BENEATH
    | syscalls.RESOLVE_NO_SYMLINKS
    | syscalls.RESOLVE_NO_MAGICLINKS
    | syscalls.RESOLVE_NO_XDEV
)
# errors of a kernel or a filter that does not have the system call
_UNKNOWN: Final = (errno.ENOSYS, errno.EPERM)
# EAGAIN: somebody renamed or mounted something meanwhile, anywhere (openat2(2))
_TRIES: Final = 100


def open_beneath(directory: int, path: str | bytes, flags: int = DIRECTORY, mode: int = 0) -> int:
    """Open a relative path; the caller owns the descriptor, which no program inherits.

    Raises OSError: EXDEV if the way leads into another mount, ELOOP or ENOTDIR if it leads through
    a symlink, and what open(2) raises.
    """
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(_TRIES):
        try:
            return syscalls.openat2(directory, path, flags, resolve=_RESOLVE, mode=mode)
        except OSError as error:
            if error.errno in _UNKNOWN and not _has_openat2():
                break
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                raise
    return open_by_components(directory, path, flags, mode)


def open_by_components(directory: int, path: str | bytes, flags: int, mode: int = 0) -> int:
    """The same with open(2) alone. A mount that is made meanwhile may go unnoticed."""
    *way, last = os.fsencode(path).split(b"/")
    if any(name in (b"", b"..") for name in (*way, last)):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    at = directory
    try:
        for name, how in (*((name, DIRECTORY) for name in way), (last, flags)):
            below = os.open(name, how | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=at)
            if at != directory:
                os.close(at)
            at = below
        if _mount_of(at) != _mount_of(directory):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    except BaseException:
        if at != directory:
            os.close(at)
        raise
    return at


def _has_openat2() -> bool:
    try:
        os.close(syscalls.openat2(syscalls.AT_FDCWD, ".", os.O_PATH, resolve=0))
    except OSError as error:
        return error.errno not in _UNKNOWN
    return True


def _mount_of(fd: int) -> int:
    """The mount id of a descriptor (proc_pid_fdinfo(5)); without a /proc, its device."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(b"mnt_id:"))
    except (OSError, StopIteration):
        return os.fstat(fd).st_dev
