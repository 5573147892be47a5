"""Explains why a mount failed: mount(2) has one errno for a dozen reasons."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Final

from aufsd.kernel import probe, syscalls
from aufsd.union.backend import Verdict
from aufsd.union.branches import MountCall
from aufsd_client.errors import MountFailed, NoSpace

# errors of a full, failing or busy host; they may pass
PASSING: Final = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EBUSY, errno.EAGAIN),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EINTR, errno.ETIMEDOUT),
    }
)


def likely_cause(call: MountCall, error: OSError, kernel_log: Sequence[str]) -> str:
    """A sentence about what is wrong with a branch or the host, else the kernel's last line."""
    found = next(_causes(call, error), None)
    if found:
        return found
    said = [line for line in kernel_log if call.fstype in line]
    if said:
        return f"the kernel says: {said[-1]}"
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _causes(call: MountCall, error: OSError) -> Iterator[str]:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        yield (
            f"out of file descriptors, and each of {len(call.dirs)} directories needs one: "
            "raise LimitNOFILE"
        )
    if not _is_directory(call.target):
        yield f"the mount point {call.target} is missing or is no directory"
    for path in call.dirs:
        yield from _wrong_branch(call.fstype, path)
    if call.fstype.partition(".")[0] not in probe.filesystems():
        yield f"this kernel has no {call.fstype}"
    if error.errno == errno.EPERM:
        yield (
            "not permitted: CAP_SYS_ADMIN is missing, or this kernel does not allow "
            f"{call.fstype} in a user namespace"
        )
    if 'context="' in call.data and not probe.has_selinux():
        yield "a mount label was given, and this kernel has no SELinux or no policy loaded"
    if error.errno == errno.ENOSPC and call.fstype != "aufs":
        yield "too many mounts in this namespace (fs.mount-max), or no space for the work directory"
    if error.errno == errno.EROFS:
        yield "the file system of the writable branch, or of the work directory, is read-only"
    if error.errno == errno.ESTALE:
        yield "the writable branch was last mounted over other parents with index=on"
    if error.errno == errno.E2BIG:
        yield "too many options or branches for one call"


def _is_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _wrong_branch(fstype: str, path: str) -> Iterator[str]:
    try:
        found = os.lstat(path)
    except OSError as error:
        yield f"the directory {path} cannot be reached: {error.strerror}"
        return
    if not stat.S_ISDIR(found.st_mode):
        yield f"the directory {path} is no directory"
        return
    reason = _UNFIT.get((fstype, syscalls.statfs_type(path)))
    if reason:
        yield f"the directory {path} lies on {reason}"


def refused(fstype: str, store: str, error: OSError | MountFailed | NoSpace) -> Verdict:
    """The verdict if a trial union could not be mounted, or did not work."""
    unfit = _UNFIT.get((fstype, syscalls.statfs_type(store)))
    if unfit:
        return Verdict(f"the store lies on {unfit}", incompatible=True)
    if isinstance(error, NoSpace):
        return Verdict(f"a trial mount failed: {error.message}", passing=True)
    if isinstance(error, MountFailed):
        name = error.data["errno"]
        by_host = name in ("EPERM", "EACCES", "ENODEV", "ENOSYS")
        passing = name in {errno.errorcode[number] for number in PASSING}
        reason = f"a trial mount failed: {error.message}"
        return Verdict(reason, incompatible=not by_host and not passing, passing=passing)
    passing = error.errno in PASSING
    reason = f"a trial mount does not work as it should: {error}"
    return Verdict(reason, incompatible=not passing, passing=passing)


# by (union, f_type of the branch): what the kernel does not say in words. The trial mount decides;
# this names the reason. Docker refused btrfs too, on which aufs works today
_UNFIT: Final = {
    ("aufs", syscalls.AUFS_SUPER_MAGIC): "aufs, which aufs refuses as a branch",
    ("aufs", syscalls.ECRYPTFS_SUPER_MAGIC): "eCryptfs, whose names are too short for aufs",
    ("aufs", syscalls.OVERLAYFS_SUPER_MAGIC): "overlayfs, which aufs refuses as a branch",
    ("aufs", syscalls.FUSE_SUPER_MAGIC): "FUSE, which aufs takes read-only at most",
    ("overlay", syscalls.AUFS_SUPER_MAGIC): "aufs, which overlayfs cannot write through",
    ("overlay", syscalls.ECRYPTFS_SUPER_MAGIC): "eCryptfs, which overlayfs refuses",
    ("overlay", syscalls.NFS_SUPER_MAGIC): "NFS, which overlayfs cannot write through",
    ("overlay", syscalls.OVERLAYFS_SUPER_MAGIC): "overlayfs, which cannot be stacked so deep",
}
