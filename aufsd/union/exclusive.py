"""One live union at a time on a writable branch; neither aufs nor overlayfs (index=off) insists.

A union that was unmounted may live on: detached, or as a copy in another mount namespace. So each
writable mount leaves a note in the layer's work directory of what it was to the kernel, and the
next one asks first whether that still lives. A union nobody noted is found by overlayfs's own
word in the kernel's log, after the fact and before anybody is given the mount.
"""

import errno
import os
import re
from contextlib import suppress
from typing import Final, NamedTuple

import structlog

from aufsd.kernel import syscalls
from aufsd.kernel.log import KernelLog
from aufsd.store.dialect import XattrNamespace
from aufsd.union import runner
from aufsd.union.backend import Union
from aufsd.union.branches import plan_overlay
from aufsd.union.scratch import scratch_dirs
from aufsd_client.errors import MountFailed, NoSpace

log = structlog.get_logger(__name__)

SYSFS: Final = "/sys/fs/aufs"
# ovl_report_in_use() in fs/overlayfs/super.c
_IN_USE: Final = ("upperdir is in-use", "workdir is in-use")


# of every host, and none of a store's
_TMPFS: Final = ("/dev/shm", "/run")
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


_NOTE: Final = re.compile(
    "overlay ([0-9]{1,10})|aufs (si_[0-9a-f]{0,16}) ([0-9]{1,19}) ([0-9]{1,10})"
)


def note(work: str, *words: str | int) -> None:
    """Remember the writable union just mounted: `overlay DEVICE`, or `aufs NAME INODE DEVICE`, of
    which the first two are those of sysfs.
    """
    text, path = " ".join(map(str, words)), f"{work}/union"
    if _read(work) == text:
        return
    try:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.symlink(text, path)
    except OSError as error:
        # no reason to take a good mount down, on a full disk
        log.warning("a writable union is not noted", path=path, error=str(error))


def refuse_if_written(union: Union, scratch: str, namespace: XattrNamespace) -> None:
    """Raise MountFailed (EBUSY) if the last writable union of this layer still lives."""
    noted = _noted(union.work)
    if noted is None:
        written = False
    elif noted.name:
        written = _is_union_of_aufs(noted.name, noted.inode)
    else:
        # a freed device number is given to the next file system, so a trial makes sure
        written = _may_live(noted.device) and is_upper_in_use(union.top, scratch, namespace)
    if written:
        raise in_use(union)


def may_live(work: str) -> bool:
    """Whether the last writable union may live still: False is sure. Right after it was unmounted
    True is too, but for a file system that was mounted in between and got its device number.
    """
    noted = _noted(work)
    if noted is None:
        return False
    if noted.name:
        return _is_union_of_aufs(noted.name, noted.inode)
    return _may_live(noted.device)


def forget(work: str) -> None:
    """The last writable union is known to be gone: nobody has to ask again."""
    with suppress(OSError):
        os.unlink(f"{work}/union")


def noted_device(work: str) -> int | None:
    """The device number of the writable union that was noted last; None if it was not."""
    noted = _noted(work)
    return noted.device if noted else None


def in_use(union: Union) -> MountFailed:
    """The error of a layer whose content another mount still writes."""
    return MountFailed(
        f"the content of layer {union.id} is still written by another mount, one that was detached "
        "or lives on in another mount namespace; end what uses it",
        id=union.id,
        errno="EBUSY",
        options=f"{union.top}=rw",
        cause="the writable branch is in use by another mount",
    )


def is_upper_in_use(upper: str, scratch: str, namespace: XattrNamespace) -> bool:
    """Whether a live overlay mount, seen by us or not, writes to `upper`: asked by a trial.

    The trial is made in `scratch`, or where that is full on a tmpfs. Raises OSError if it cannot be
    made anywhere.

    With index=on the kernel refuses a lower directory that is another mount's upper (EBUSY; Linux
    4.13, ovl_is_inuse()). The trial's own upper is a new directory in `scratch`, so nothing is
    written near the layer. A trial that fails in another way tells nothing, nor does one in a user
    namespace, where overlayfs goes without an index (ovl_can_decode_fh()).
    """
    for place in (scratch, *_TMPFS):
        try:
            return _is_refused(upper, place, namespace)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            left = error
        except NoSpace as error:
            left = OSError(errno.ENOSPC, error.message, place)
    raise left


def _is_refused(upper: str, scratch: str, namespace: XattrNamespace) -> bool:
    with scratch_dirs(scratch, "upper", "work", "merged") as at:
        call = plan_overlay(
            f"{at}/merged",
            (upper,),
            upper=f"{at}/upper",
            work=f"{at}/work",
            options=("index=on", *user_xattr(namespace)),
        )
        try:
            runner.run("trial", (call,), stands=_is_overlay, log=KernelLog(-1))
        except MountFailed as error:
            return error.data["errno"] == "EBUSY"
        runner.undo(call.target)
    return False


def _is_overlay(target: str) -> bool:
    return runner.is_mounted(target, syscalls.OVERLAYFS_SUPER_MAGIC)


def says_in_use(log: KernelLog) -> bool:
    """Whether overlayfs said since the mark that some upper directory is mounted twice."""
    return any(words in line for line in log.since() for words in _IN_USE)


def user_xattr(namespace: XattrNamespace) -> tuple[str, ...]:
    """The option of overlayfs for xattrs in `user` (Linux 5.11)."""
    return ("userxattr",) if namespace == "user" else ()


class _Noted(NamedTuple):
    """The device of a union; of one of aufs also its name in sysfs, and the inode of that."""

    device: int
    name: str = ""
    inode: int = 0


def _noted(work: str) -> _Noted | None:
    """What is noted; None for nothing, or nothing that `note` would have written."""
    found = _NOTE.fullmatch(_read(work))
    if found is None:
        return None
    return _Noted(int(found[1] or found[4]), found[2] or "", int(found[3] or 0))


def _read(work: str) -> str:
    try:
        return os.readlink(f"{work}/union")
    except OSError as error:
        # EINVAL: it is no symlink
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise
        return ""


def _is_union_of_aufs(name: str, inode: int) -> bool:
    """Whether aufs has this union: a directory of its in sysfs lives as long as the superblock.

    The name may come again, the inode number does not. Never ask for the branches in there: on aufs
    6.1 that crashes the kernel (a null pointer in sysaufs_si_show()) if it meets a union that some
    process is just mounting or unmounting.
    """
    try:
        return os.stat(f"{SYSFS}/{name}").st_ino == inode
    except FileNotFoundError:
        return False


def _may_live(device: int) -> bool:
    try:
        return syscalls.ustat(device)
    except (NotImplementedError, OSError):
        return True  # not on this architecture, or a container's filter refuses it
