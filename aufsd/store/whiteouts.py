"""What a whiteout is, and what makes a directory opaque: for aufs, for overlayfs, and in between.

Everything that reads or writes a layer's content asks this module. Which of the two a layer uses is
`dialect`'s, which of its whiteouts are kept is `aufsd.archive.settling`'s, and what a name in an
archive means is `aufsd.archive.names`'s.

aufs has names that begin with `.wh.`: `.wh.NAME` deletes NAME, `.wh..wh..opq` makes its directory
opaque. overlayfs has a character device 0:0 under the name, and an xattr of the directory.
"""

import errno
import os
import stat
from dataclasses import dataclass
from typing import Final

from aufsd.store.dialect import Dialect, UnknownMark, Where, interrupted, read_xattr

# include/uapi/linux/aufs_type.h: AUFS_WH_PFX, AUFS_WH_DIROPQ, AUFS_WH_BASE, _ORPHDIR, _PLINKDIR
WHITEOUT: Final = b".wh."
META: Final = b".wh..wh."
OPAQUE: Final = b".wh..wh..opq"
PLINKS: Final = b".wh..wh.plnk"
# what a branch that was mounted rw has at its top
HOUSEKEEPING: Final = frozenset({b".wh..wh.aufs", b".wh..wh.orph", PLINKS})
# AUFS_MAX_NAMELEN: a longer name is listed, and every lookup of it fails with ENAMETOOLONG
AUFS_NAME_MAX: Final = 242
# WHITEOUT_MODE and WHITEOUT_DEV in include/linux/fs.h
WHITEOUT_NODE: Final = stat.S_IFCHR
WHITEOUT_DEVICE: Final = os.makedev(0, 0)

# longer names have no aufs whiteout, which would not be a name
_DELETED_MAX: Final = 255 - len(WHITEOUT)
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


# --- aufs's -------------------------------------------------------------------------------------


def deleted_name(name: bytes) -> bytes | None:
    """The name that an aufs whiteout deletes; None if `name` is no whiteout.

    `.wh.`, `.wh..`, `.wh...` and all of `.wh..wh.*` delete nothing.
    """
    if not name.startswith(WHITEOUT) or name.startswith(META):
        return None
    deleted = name[len(WHITEOUT) :]
    return None if deleted in (b"", b".", b"..") else deleted


# --- overlayfs's --------------------------------------------------------------------------------


def is_whiteout_node(found: os.stat_result) -> bool:
    """Whether an entry is overlayfs's whiteout."""
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == WHITEOUT_DEVICE


def is_node(entry: "os.DirEntry[bytes]") -> bool:
    """The same of an entry of the current directory; the kernel is seldom asked. Raises OSError."""
    if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False):
        return False
    return not entry.is_symlink() and is_whiteout_node(os.lstat(entry.name))


def opaque_xattr(namespace: str) -> str:
    """The xattr that makes a directory opaque for overlayfs, with the value b"y"."""
    return f"{namespace}.overlay.opaque"


def has_opaque_xattr(where: Where, namespace: str) -> bool:
    """Whether overlayfs takes the directory for opaque."""
    return read_xattr(where, opaque_xattr(namespace)) == b"y"


def whiteout_xattr(root: Where, namespace: str) -> str:
    """The xattr that makes an empty file a whiteout in the layer with this root; "" if none does.

    Linux 6.8 looks for it where the layer's root says so. It makes none itself; tools do that may
    not make nodes (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories").
    """
    says_so = read_xattr(root, opaque_xattr(namespace)) == b"x"
    return f"{namespace}.overlay.whiteout" if says_so else ""


# --- either -------------------------------------------------------------------------------------


def is_whiteout(entry: "os.DirEntry[bytes]", dialect: Dialect) -> bool:
    """Whether an entry of the current directory is a whiteout in this dialect. Raises OSError."""
    if dialect is Dialect.AUFS:
        return deleted_name(entry.name) is not None
    return dialect is Dialect.OVERLAY and is_node(entry)


def is_opaque_root(path: str, dialect: Dialect, namespace: str) -> bool:
    """Whether a layer's `/` is opaque, and hides all of its parents. Raises UnknownMark.

    In a mount of fuse-overlayfs a user can make a symlink of the mark's name, or a directory. To
    fuse-overlayfs it is the mark, aufs fails with EIO (au_wh_test()), and for others it is a name.
    """
    if dialect is Dialect.OVERLAY:
        return has_opaque_xattr(path, namespace)
    try:
        found = os.lstat(os.path.join(os.fsencode(path), OPAQUE))
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISREG(found.st_mode):
        what = stat.filemode(found.st_mode)
        raise UnknownMark(errno.EINVAL, f"{OPAQUE.decode()} in it is no regular file ({what})")
    return True


@dataclass(frozen=True, slots=True)
class Marks:
    """How one layer's marks are read: aufs's, overlayfs's, none, or both in a half converted one.

    `whiteout_xattr` makes an empty file a whiteout of overlayfs's; "" if none does.
    """

    aufs: bool
    overlay: bool
    namespace: str
    whiteout_xattr: str

    def is_opaque(self, fd: int) -> bool:
        """Whether the directory `fd` ends the merge."""
        if self.overlay and has_opaque_xattr(fd, self.namespace):
            return True
        return self.aufs and _exists(fd, OPAQUE)

    def hides(self, fd: int, name: bytes) -> bool:
        """Whether an aufs whiteout of `name` stands in the directory `fd`."""
        return self.aufs and len(name) <= _DELETED_MAX and _exists(fd, WHITEOUT + name)

    def is_content(self, name: bytes) -> bool:
        """Whether the current directory has a name, and that is no whiteout."""
        try:
            return not self.is_whiteout(name, os.lstat(name), None)
        except FileNotFoundError:
            return False

    def is_whiteout(self, name: bytes, found: os.stat_result, directory: int | None) -> bool:
        """Whether the entry `name` of a directory, the current one if None, is overlayfs's."""
        if not self.overlay:
            return False
        if self.whiteout_xattr and stat.S_ISREG(found.st_mode) and not found.st_size:
            fd = os.open(name, _FILE, dir_fd=directory)
            try:
                return self.whiteout_xattr in os.listxattr(fd)
            finally:
                os.close(fd)
        return is_whiteout_node(found)

    def is_whiteout_entry(self, entry: "os.DirEntry[bytes]") -> bool:
        """The same of an entry of the current directory; the kernel is seldom asked."""
        if entry.is_file(follow_symlinks=False):
            may_be = bool(self.whiteout_xattr)
        else:
            directory = entry.is_dir(follow_symlinks=False)
            may_be = self.overlay and not (directory or entry.is_symlink())
        return may_be and self.is_whiteout(entry.name, os.lstat(entry.name), None)


def marks_of(root: int, dialect: Dialect, namespace: str) -> Marks:
    """How the marks of the layer with the root directory `root` are read. Raises OSError."""
    both = interrupted(root, namespace) is not None
    overlay = both or dialect is Dialect.OVERLAY
    xattr = whiteout_xattr(root, namespace) if overlay else ""
    return Marks(both or dialect is Dialect.AUFS, overlay, namespace, xattr)


def _exists(fd: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
