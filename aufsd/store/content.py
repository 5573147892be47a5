"""Makes, copies and freezes a layer's content: a directory, or a subvolume on btrfs."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from aufsd.digits import number
from aufsd.kernel import btrfs
from aufsd.store.dialect import Where, XattrNamespace
from aufsd.store.origin import Origin, write_origin

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# the most bytes that a layer may have, as text, on the top of its subvolume
_SIZE_XATTR = "aufsd.size"
_SIZE_MAX = (1 << 63) - 1


def copy_attributes(source: str, target: str) -> None:
    """Give one directory the owner, mode, times and xattrs of another, except trusted.* ones.

    Raises OSError, also if one of them is no directory.
    """
    with opened_directory(source) as like, opened_directory(target) as fresh:
        found = os.fstat(like)
        os.chown(fresh, found.st_uid, found.st_gid)
        for name in os.listxattr(like):
            if is_copied(name):
                with contextlib.suppress(OSError):
                    os.setxattr(fresh, name, os.getxattr(like, name))
        os.chmod(fresh, stat.S_IMODE(found.st_mode))
        os.utime(fresh, ns=(found.st_atime_ns, found.st_mtime_ns))


def is_copied(name: str) -> bool:
    """Whether `copy_attributes` copies an xattr.

    trusted.* and user.aufsd.* belong to the store, and the system sets a security label.
    """
    return not name.startswith(("trusted.", "user.aufsd.", "security.selinux", "user.overlay."))


def fsync(path: str) -> None:
    """fsync(2) of a directory."""
    with opened_directory(path) as fd:
        os.fsync(fd)


# --- subvolumes -----------------------------------------------------------------------------------


def make_subvolume(path: str) -> None:
    """Make an empty subvolume, mode 0755. The path must be free."""
    directory, name = os.path.split(path)
    with opened_directory(directory) as fd:
        btrfs.subvol_create(fd, os.fsencode(name))
    os.chmod(path, 0o755)


def snapshot(source: str, path: str) -> None:
    """Make a writable snapshot of a subvolume. The path must be free.

    A subvolume inside the source is an empty directory in the snapshot.
    """
    directory, name = os.path.split(path)
    with opened_directory(directory) as fd, opened_directory(source) as top:
        btrfs.snap_create(fd, os.fsencode(name), top)


def state(path: str) -> btrfs.Subvolume:
    """What btrfs says of a subvolume."""
    with opened_directory(path) as fd:
        return btrfs.subvol_info(fd)


def note_origin(path: str, parent: str, namespace: XattrNamespace) -> None:
    """Record on a snapshot from which state of its parent it was made (origin.py)."""
    own = state(path)
    write_origin(path, Origin(state(parent).uuid, own.created, own.generation), namespace)


def freeze(path: str, read_only: bool) -> None:
    """Set the property `ro` of a subvolume. A read-only subvolume cannot be renamed either."""
    with opened_directory(path) as fd:
        if btrfs.is_read_only(fd) != read_only:
            btrfs.set_read_only(fd, read_only)


def thaw(path: str) -> None:
    """Let a subvolume be written and renamed. Does nothing for an ordinary directory."""
    with opened_directory(path) as fd:
        try:
            frozen = btrfs.is_read_only(fd)
        except OSError as error:
            # another file system (ENOTTY); no subvolume (btrfs_ioctl_subvol_getflags(): EINVAL)
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
            return
        if frozen:
            btrfs.set_read_only(fd, False)


def limit(path: str, size: int, namespace: XattrNamespace) -> None:
    """Limit the bytes of a subvolume, with its parents' content. 0: no limit.

    If quota groups are off, this turns them on, and btrfs scans the whole file system.
    """
    with opened_directory(path) as fd:
        name = f"{namespace}.{_SIZE_XATTR}"
        if not size:
            # a snapshot inherits the limit too (btrfs_qgroup_inherit())
            if limit_of(fd, namespace):
                btrfs.qgroup_limit(fd, btrfs.subvol_info(fd).id, None)
                os.removexattr(fd, name)
            return
        btrfs.quota_enable(fd)
        btrfs.qgroup_limit(fd, btrfs.subvol_info(fd).id, size)
        os.setxattr(fd, name, str(size).encode())


def limit_of(where: Where, namespace: XattrNamespace) -> int:
    """The limit that was set; 0 for none."""
    try:
        return number(os.getxattr(where, f"{namespace}.{_SIZE_XATTR}"), _SIZE_MAX) or 0
    except OSError:
        return 0


def holds_subvolumes(path: str) -> bool:
    """Whether there are subvolumes inside a subvolume."""
    with opened_directory(path) as fd:
        return bool(btrfs.nested(fd))


@contextlib.contextmanager
def opened_directory(path: str) -> Iterator[int]:
    """A descriptor of a directory that no symlink leads to. Raises OSError."""
    fd = os.open(path, _DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)
