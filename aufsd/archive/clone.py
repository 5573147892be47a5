"""Copies a layer's content into staging, for an archive to be merged into it.

Regular files become hard links of the layer's files. That is safe, because unpacking replaces files
and never changes one. Everything else is copied.
"""

import errno
import os
import stat
from typing import Final

from aufsd.archive.attributes import read_xattr
from aufsd.kernel.beneath import DIRECTORY
from aufsd.store import dialect as marks
from aufsd.store import whiteouts
from aufsd.store.walk import Descent
from aufsd.union import conversion

_CHUNK: Final = 1 << 24


def clone(source: str, staging: str, namespace: str) -> None:
    """Copy what the directory `source` holds into the empty `staging`; both are on one mount.

    With owners, modes, times and xattrs, also the marks of the root. aufs's own files are left out.
    If a conversion of the source was interrupted, the copy is converted back to the source's
    dialect.
    """
    from_fd = os.open(source, DIRECTORY)
    to_fd = os.open(staging, DIRECTORY)
    half = marks.interrupted(from_fd, namespace)
    dialect = marks.read_dialect(from_fd, namespace)
    with Descent(from_fd) as original, Descent(to_fd) as copy:
        _copy_tree(original, copy)
    if half is not None:
        marks.remove_xattr(to_fd, f"{namespace}.aufsd.converting")
        conversion.rewrite(to_fd, dialect, namespace)


def _copy_tree(original: Descent, copy: Descent) -> None:
    _copy_here(original, copy.fd)
    while True:
        name = original.take()
        if name is not None:
            original.down(name)
            os.mkdir(name, 0o700, dir_fd=copy.fd)
            copy.down(name)
            _copy_here(original, copy.fd)
            continue
        _copy_attributes(original.fd, copy.fd)
        depth = original.depth - 1
        if depth < 0:
            return
        original.up()
        copy.up()
        if (original.depth, copy.depth) != (depth, depth):
            raise OSError(errno.ESTALE, "directories were moved while the layer was copied")


def _copy_here(original: Descent, target: int) -> None:
    """Copy the entries of a directory, except directories, which come later."""
    top = not original.depth
    os.fchdir(original.fd)
    with os.scandir(b".") as entries:
        for entry in entries:
            name = entry.name
            if top and name in whiteouts.HOUSEKEEPING:
                continue
            if entry.is_dir(follow_symlinks=False):
                original.later(name)
                continue
            try:
                os.link(name, name, dst_dir_fd=target, follow_symlinks=False)
            except OSError as error:
                # the file has the maximum number of links
                if error.errno != errno.EMLINK:
                    raise
                _copy_file(name, target)


def _copy_file(name: bytes, target: int) -> None:
    found = os.lstat(name)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EMLINK, "too many links", os.fsdecode(name))
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    made = os.open(name, flags, 0o600, dir_fd=target)
    try:
        while os.sendfile(made, source, None, _CHUNK):
            pass
        _copy_attributes(source, made)
    finally:
        os.close(source)
        os.close(made)


def _copy_attributes(source: int, target: int) -> None:
    found = os.fstat(source)
    os.fchown(target, found.st_uid, found.st_gid)
    for name in os.listxattr(source):
        # a label is the system's to set
        if name.startswith("security.") and name != "security.capability":
            continue
        value = read_xattr(source, name)
        if value or name != "security.capability":
            os.setxattr(target, name, value)
    os.fchmod(target, stat.S_IMODE(found.st_mode))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
