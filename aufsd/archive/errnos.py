"""Translates the errno of a system call on a layer's files into an error of the API.

One table is used for unpacking and for reading. It has every errno that a file system may give,
with the API's error and a sentence that names the entry. It lacks those that only a fault of aufsd
causes (EBADF, EFAULT, ENOTTY, ...): they become an InternalError.
"""

import errno
import os
from typing import Final, NamedTuple

from aufsd.archive.meter import shown
from aufsd_client.errors import (
    AufsdError,
    BadArchive,
    LayerDamaged,
    LimitExceeded,
    NoSpace,
    PermissionDenied,
)


class Answer(NamedTuple):
    """The API's error for an errno, and what it means."""

    kind: type[AufsdError]
    meaning: str


_DISK: Final = "the disk or its file system failed; the kernel's log says how"
_DESCRIPTORS: Final = "more files have to be open at once than this process may have"
_GONE: Final = "it went away meanwhile, and nothing but aufsd may change what it works on"

ANSWERS: Final[dict[int, Answer]] = {
    errno.ENOSPC: Answer(NoSpace, "no space is left on the file system"),
    errno.EDQUOT: Answer(NoSpace, "the quota is used up"),
    # a bad name or value
    errno.ENAMETOOLONG: Answer(BadArchive, "a name that is too long for the file system"),
    errno.EILSEQ: Answer(BadArchive, "a name that is not in the encoding of the file system"),
    errno.EINVAL: Answer(BadArchive, "a value that the file system does not take"),
    errno.EOVERFLOW: Answer(BadArchive, "a value that the file system does not take"),
    errno.EDOM: Answer(BadArchive, "a value that the file system does not take"),
    errno.ERANGE: Answer(BadArchive, "a value that the file system does not take"),
    errno.E2BIG: Answer(BadArchive, "a value that is too large for the kernel"),
    errno.EFBIG: Answer(BadArchive, "larger than a file may be on this file system"),
    errno.ENOTSUP: Answer(BadArchive, "of a kind that this file system cannot hold"),
    errno.ENOSYS: Answer(BadArchive, "of a kind that this kernel cannot make"),
    errno.EMLINK: Answer(BadArchive, "more links than this file system gives one file"),
    errno.EXDEV: Answer(BadArchive, "a hard link across file systems or quota projects"),
    # something is in the way
    errno.ENOTDIR: Answer(BadArchive, "a file stands where a directory has to be"),
    errno.EISDIR: Answer(BadArchive, "a directory stands where a file has to be"),
    errno.EEXIST: Answer(BadArchive, "something else stands in its place and does not go"),
    errno.ENOTEMPTY: Answer(BadArchive, "something else stands in its place and does not go"),
    errno.ELOOP: Answer(BadArchive, "symlinks lead in a circle"),
    errno.EBUSY: Answer(PermissionDenied, "something is mounted there, or the kernel uses it"),
    errno.ETXTBSY: Answer(PermissionDenied, "the kernel uses it: it is run, or swap"),
    errno.EPERM: Answer(
        PermissionDenied, "not permitted: an immutable file, or a right is missing"
    ),
    errno.EACCES: Answer(PermissionDenied, "not permitted: a right is missing, or SELinux refused"),
    errno.EROFS: Answer(
        PermissionDenied, "the file system is read-only; the kernel's log says why"
    ),
    # limits of the process
    errno.EMFILE: Answer(LimitExceeded, _DESCRIPTORS),
    errno.ENFILE: Answer(LimitExceeded, "the host has no room for another open file"),
    errno.ENOMEM: Answer(LimitExceeded, "the kernel has no memory for it"),
    errno.ENOBUFS: Answer(LimitExceeded, "the kernel has no memory for it"),
    errno.ENOLCK: Answer(LimitExceeded, "the kernel has no memory for it"),
    errno.EAGAIN: Answer(LimitExceeded, "the kernel has no room for it at the moment; try again"),
    errno.EINTR: Answer(LimitExceeded, "it was interrupted; try again"),
    # the disk
    errno.EIO: Answer(LayerDamaged, _DISK),
    errno.EUCLEAN: Answer(LayerDamaged, _DISK),
    errno.EBADMSG: Answer(LayerDamaged, _DISK),
    errno.ENXIO: Answer(LayerDamaged, _DISK),
    errno.ENODEV: Answer(LayerDamaged, _DISK),
    errno.ESHUTDOWN: Answer(LayerDamaged, _DISK),
    errno.EREMOTEIO: Answer(LayerDamaged, _DISK),
    errno.ETIMEDOUT: Answer(LayerDamaged, _DISK),
    errno.ENOTCONN: Answer(LayerDamaged, _DISK),
    errno.ESTALE: Answer(LayerDamaged, _GONE),
    errno.ENOENT: Answer(LayerDamaged, _GONE),
    errno.ENODATA: Answer(LayerDamaged, _GONE),
}

# a file system does not take an xattr, or not on this type of file: the entry
# is taken, and a warning names the attribute
ATTRIBUTE_REFUSED: Final = frozenset(
    {
        errno.ENOTSUP,
        errno.EPERM,
        errno.EACCES,
        errno.EINVAL,
        errno.E2BIG,
        # a name of more than 255 bytes, a value that is larger than a block of ext4
        errno.ERANGE,
        errno.ENAMETOOLONG,
        errno.EFBIG,
        errno.EOVERFLOW,
    }
)
# with that much left on the file system, ENOSPC of an xattr means that its inode has no room
_ROOM: Final = 1 << 20


def answer(error: OSError, name: bytes = b"", **data: object) -> AufsdError | None:
    """The API's error for one of the operating system; None if it is a fault of this program's.

    `name` is the entry's; without one, what the system call named.
    """
    number = error.errno or 0
    found = ANSWERS.get(number)
    if found is None:
        return None
    if not name and error.filename is not None and not isinstance(error.filename, int):
        name = os.fsencode(error.filename)
    data["errno"] = errno.errorcode[number]
    if found.kind is LayerDamaged:
        data["problem"] = found.meaning
    where = f"{shown(name)}: " if name else ""
    if name:
        data.setdefault("entry", shown(name))
    return found.kind(f"{where}{found.meaning} ({error.strerror})", **data)


def is_attribute_refused(error: OSError) -> bool:
    """Whether setxattr(2) in the current directory's file system failed for this attribute alone.

    ENOSPC means two things: ext4 gives it where the attributes of one inode are too large for it.
    """
    if error.errno != errno.ENOSPC:
        return error.errno in ATTRIBUTE_REFUSED
    try:
        found = os.statvfs(b".")
    except OSError:
        return False
    # a file system that makes inodes as it goes says 0 of both
    inodes = found.f_favail > 0 or found.f_files == 0
    return inodes and found.f_bavail * found.f_frsize > _ROOM
