"""An SELinux label on everything that a layer holds.

What label.Relabel(path, label, shared=False) of opencontainers/selinux does, for file systems whose
layers are no mounts of their own, so that `context=` cannot label them (the seed's change message).
It works on the xattr, so also where the kernel has no SELinux.

Runs in a process of its own whose root is the layer. Nothing follows a symlink or opens a file:
fsetxattr(2) does not take an O_PATH descriptor, so each name is set from its own directory.
"""

import errno
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Final

from aufsd.kernel import syscalls

XATTR: Final = "security.selinux"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# setting one is a transaction of the file system's, some 30 microseconds on btrfs, in which Python
# lets other threads run; those of different directories seldom touch the same block
_THREADS: Final = min(4, os.cpu_count() or 1)
_BATCH: Final = 256
# batches that wait, each with a descriptor
_AHEAD: Final = 16


def relabel(label: str) -> int:
    """Give every inode below the root the label; how many had another, or none.

    Symlinks and devices are labelled themselves. Raises OSError, NoSpace's among them.
    """
    value = label.encode()
    top = os.open("/", _DIRECTORY)
    # a tree whose top has no label need not be asked name by name
    some = _label_of("/") is not None
    changed = 0
    waiting: deque[Future[int]] = deque()
    with ThreadPoolExecutor(_THREADS, initializer=_leave_directory) as threads:
        waiting.append(threads.submit(_set, os.dup(top), ["."], value, some=some))
        try:
            for fd, names in _batches(top):
                waiting.append(threads.submit(_set, fd, names, value, some=some))
                if len(waiting) > _AHEAD:
                    changed += waiting.popleft().result()
            changed += sum(batch.result() for batch in waiting)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return changed


def _leave_directory() -> None:
    """Have a current directory of this thread's own (unshare(2), CLONE_FS)."""
    syscalls.unshare(syscalls.CLONE_FS)


def _batches(top: int) -> Iterator[tuple[int, list[str]]]:
    """Names of everything below `top`, each batch with a descriptor of its directory to close."""
    levels = [(top, ["."])]
    while levels:
        fd, directories = levels[-1]
        if not directories:
            os.close(fd)
            levels.pop()
            continue
        here = os.open(directories.pop(), _DIRECTORY, dir_fd=fd)
        found: list[str] = []
        with os.scandir(here) as entries:
            while batch := list(islice(entries, _BATCH)):
                found += [entry.name for entry in batch if entry.is_dir(follow_symlinks=False)]
                yield os.dup(here), [entry.name for entry in batch]
        levels.append((here, found))


def _set(directory: int, names: Sequence[str], value: bytes, *, some: bool) -> int:
    changed = 0
    try:
        os.fchdir(directory)
        for name in names:
            if some and _label_of(name) == value:
                continue
            os.setxattr(name, XATTR, value, follow_symlinks=False)
            changed += 1
    finally:
        os.close(directory)
    return changed


def _label_of(path: str) -> bytes | None:
    try:
        # a kernel with SELinux ends it with a NUL
        return os.getxattr(path, XATTR, follow_symlinks=False).rstrip(b"\0")
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return None
