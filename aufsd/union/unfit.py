"""What the place of a store has to be able to do, whatever serves it, found by trying it."""

import errno
import os
from typing import Final

from aufsd.kernel import probe, syscalls
from aufsd.union.scratch import scratch_dirs

_CLONE: Final = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC
# what a file system that knows no flags of renameat2(2), or not this one, answers
_NO_FLAG: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def unfit(parent: str) -> str:
    """Why no store can lie where the directory `parent` is, "" if one can.

    Nothing is left in it. OSError where it cannot be written.
    """
    with scratch_dirs(parent, "one", "other") as at:
        return _renames(at) or _clones(at)


def _renames(at: str) -> str:
    """Content is put into place by a rename that replaces nothing, or that exchanges two names."""
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
    """An archive process gets mounts of its own of what it may see."""
    try:
        os.close(syscalls.open_tree(syscalls.AT_FDCWD, at, _CLONE))
    except OSError as error:
        # do_loopback() in fs/namespace.c; what else there is, such as EPERM, a trial mount tells
        if error.errno == errno.EINVAL:
            return (
                "the mount that the store lies in is unbindable: have it private "
                "(mount --make-private) or shared"
            )
    return ""
