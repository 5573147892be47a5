"""Turns aufs's pseudo-links into real hard links, before a writable branch is used by itself.

When one name of a hard-linked lower file is written, aufs copies the file up under that name
alone, keeps the inode in memory, and links it as `.wh..wh.plnk/INODE.BRANCHINODE` at the top of the
writable branch. The other names lead to the new file for as long as the union is mounted; after
that they show the old content again. What `auplink flush` of aufs-tools did about it, which no
current distribution ships: have the kernel link every other name in the branch. The first read(2)
through a name does that (au_file_refresh_by_inode() in fs/aufs/file.c; merely to open it does not);
for what cannot be read, to set its times does.

Unmounting is here because nothing else may come between the two. Both backends use it: a union
outlives the daemon, and the next one may be set to another backend.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from aufsd.digits import number
from aufsd.kernel import syscalls
from aufsd.store.walk import Descent, walk
from aufsd.store.whiteouts import AUFS_NAME_MAX
from aufsd.union.backend import NotFlushed

DIRECTORY: Final = ".wh..wh.plnk"
_INODE_MAX: Final = (1 << 64) - 1
# include/uapi/linux/aufs_type.h: _IOW('A', AuCtl_WBR_FD, struct aufs_wbr_fd)
_AUFS_CTL_WBR_FD: Final = 0x40084102
_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# how many names a failed flush names
_NAMED: Final = 20
_FILE: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC


def flush(target: str) -> int:
    """Link every name of the pseudo-linked files of the union at `target`; how many names.

    Nothing on anything but a writable aufs. Walks the whole union if there is a pseudo-link, and
    stays in it: file systems mounted inside are left alone. Raises NotFlushed, with all linked that
    can be, and OSError if there is nothing at `target`.
    """
    if not _is_aufs(target):
        return 0
    with _opened(target) as root, _writable_branch(root) as branch:
        return _flush(root, branch)


def unmount(target: str, *, flush: bool = True) -> None:
    """Flush and umount2(2), once; then remove the pseudo-links, for each name is a real one now.

    Raises NotFlushed (a full disk, most likely): then it is not unmounted, because the names that
    are not linked would go back to their old content. Raises OSError as umount2(2) does. Without
    `flush` it is unmounted all the same, and its pseudo-links are left in the branch.
    """
    if not flush or not _is_aufs(target):
        return syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW)
    with ExitStack() as kept:
        with _opened(target) as root:
            branch = kept.enter_context(_writable_branch(root))
            _flush(root, branch)
        syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW)
        if branch is not None:
            with suppress(OSError):  # it is unmounted; the next union has nothing of them
                _forget(branch)
    return None


def discard(branch: str) -> None:
    """Remove the pseudo-links of an earlier union from a branch that is not mounted.

    Docker without auplink left them, and what a flush failed for. Their numbers are an earlier
    union's: in the next one they are those of other files, which its flush would copy up.
    """
    with _opened(branch) as fd:
        _forget(fd)


def _is_aufs(target: str) -> bool:
    return syscalls.statfs_type(target) == syscalls.AUFS_SUPER_MAGIC


@contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, _DIR)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _writable_branch(root: int) -> Iterator[int | None]:
    """The writable branch of an open union, opened by aufs itself; None if all are read-only."""
    try:
        branch = fcntl.ioctl(root, _AUFS_CTL_WBR_FD, 0)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTTY):
            raise
        yield None
        return
    os.set_inheritable(branch, False)
    try:
        yield branch
    finally:
        os.close(branch)


def _flush(root: int, branch: int | None) -> int:
    if branch is None:
        return 0
    linked, failed = 0, _Failures()
    try:
        inodes = _pending(branch)
        for here, name in names(root, inodes) if inodes else ():
            try:
                _link(here.fd, name)
            except FileNotFoundError:
                continue  # a name that went meanwhile needs no link
            except OSError as error:
                # the others are linked all the same: fewer are lost if the machine stops
                failed.add(error, here.path(name))
            else:
                linked += 1
    except OSError as error:
        failed.first = failed.first or error
    if failed.first is not None:
        if os.fstatvfs(branch).f_flag & os.ST_RDONLY:
            # au_pin() in fs/aufs/i_op.c makes EBUSY of it
            failed.first = OSError(errno.EROFS, os.strerror(errno.EROFS))
        raise NotFlushed(failed.first, failed.names, failed.count) from failed.first
    return linked


@dataclass(slots=True)
class _Failures:
    """The names that could not be linked: the first ones, how many, and why the first was not."""

    first: OSError | None = None
    names: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, error: OSError, path: str) -> None:
        self.first = self.first or error
        self.count += 1
        if len(self.names) < _NAMED:
            self.names.append(path)


def _pending(branch: int) -> frozenset[int]:
    """The union's inode numbers that have pseudo-links."""
    found = (number(name.partition(".")[0], _INODE_MAX) for name in _plinks(branch))
    return frozenset(inode for inode in found if inode is not None)


def _plinks(branch: int) -> list[str]:
    with suppress(FileNotFoundError):
        plinks = os.open(DIRECTORY, _DIR, dir_fd=branch)
        try:
            return os.listdir(plinks)
        finally:
            os.close(plinks)
    return []


def _forget(branch: int) -> None:
    for name in _plinks(branch):
        with suppress(IsADirectoryError):  # no link of aufs's
            os.unlink(f"{DIRECTORY}/{name}", dir_fd=branch)


def _link(directory: int, name: bytes) -> None:
    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if stat.S_ISREG(found.st_mode):
        fd = os.open(name, _FILE, dir_fd=directory)
        try:
            os.read(fd, 1)
        finally:
            os.close(fd)
    else:
        # not chown(-1, -1), as auplink does: that drops set-id bits and security.capability
        times = (found.st_atime_ns, found.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)


def names(root: int, inodes: Collection[int]) -> Iterator[tuple[Descent, bytes]]:
    """The names of non-directories with these inode numbers, each with the place where it is."""
    for here in walk(root):
        with os.scandir(here.fd) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                if len(name) > AUFS_NAME_MAX:
                    continue  # a lower one is listed, and nothing else can be done with it
                if entry.is_dir(follow_symlinks=False):
                    here.later(name)
                elif entry.inode() in inodes:
                    yield here, name
