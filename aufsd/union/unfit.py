"""Tries what every store needs of its file system and mount, whatever the backend."""

import errno
import os
from typing import Final

from aufsd.kernel import probe, syscalls
from aufsd.union.scratch import scratch_dirs

_CLONE: Final = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC
# errors of a file system without flags of renameat2(2), or without this flag
_NO_FLAG: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def unfit(parent: str) -> str:
    """Why no store can be where the directory `parent` is; "" if one can.

    Nothing is left in it. Raises OSError if it cannot be written.
    """
    with scratch_dirs(parent, "one", "other") as at:
        return _renames(at) or _clones(at)


def _renames(at: str) -> str:
    """Try renameat2(2): a store needs RENAME_NOREPLACE and RENAME_EXCHANGE."""
    try:
        _rename(f"{at}/one", f"{at}/new", syscalls.RENAME_NOREPLACE)
        _rename(f"{at}/new", f"{at}/other", syscalls.RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in _NO_FLAG:
            raise
        return (
            f"the store's file system ({probe.kind(at)}) cannot rename without replacing, or "
            "exchange two names, in one step (flags of renameat2(2)): a store has to lie on a "
            "local file system, such as ext4, xfs or btrfs"
        )
    return ""


def _rename(old: str, new: str, flags: int) -> None:
    syscalls.renameat2(syscalls.AT_FDCWD, old, syscalls.AT_FDCWD, new, flags)


def _clones(at: str) -> str:
    """Try to copy the mount: an archive process gets a copy of what it may see."""
    try:
        os.close(syscalls.open_tree(syscalls.AT_FDCWD, at, _CLONE))
    except OSError as error:
        # do_loopback() in fs/namespace.c; a trial mount reports other errors, such as EPERM
        if error.errno == errno.EINVAL:
            return (
                "the mount that the store lies in is unbindable: have it private "
                "(mount --make-private) or shared"
            )
    return ""
