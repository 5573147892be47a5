"""A layer's content: a directory, or on btrfs a subvolume. Made, copied, frozen."""

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
# how many bytes a layer may refer to, as text, on the top of its subvolume
_SIZE_XATTR = "aufsd.size"
_SIZE_MAX = (1 << 63) - 1


def copy_attributes(source: str, target: str) -> None:
    """Give one directory the owner, mode, times and xattrs of another; no trusted.* ones.

    Raises OSError, also if one is no directory.
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
    """Whether an xattr of a directory goes to one that is made like it.

    trusted.* and user.aufsd.* are the store's own; a security label is set by the system.
    """
    return not name.startswith(("trusted.", "user.aufsd.", "security.selinux", "user.overlay."))


def fsync(path: str) -> None:
    """fsync(2) of a directory."""
    with opened_directory(path) as fd:
        os.fsync(fd)


# --- subvolumes -----------------------------------------------------------------------------------


def make_subvolume(path: str) -> None:
    """An empty subvolume, 0755, at a path where nothing is."""
    directory, name = os.path.split(path)
    with opened_directory(directory) as fd:
        btrfs.subvol_create(fd, os.fsencode(name))
    os.chmod(path, 0o755)


def snapshot(source: str, path: str) -> None:
    """A writable snapshot of a subvolume, at a path where nothing is.

    What other subvolumes hold that lie in the source does not come along: empty directories stand
    there.
    """
    directory, name = os.path.split(path)
    with opened_directory(directory) as fd, opened_directory(source) as top:
        btrfs.snap_create(fd, os.fsencode(name), top)


def state(path: str) -> btrfs.Subvolume:
    """What btrfs says of a subvolume."""
    with opened_directory(path) as fd:
        return btrfs.subvol_info(fd)


def note_origin(path: str, parent: str, namespace: XattrNamespace) -> None:
    """Note on a snapshot what it has in common with its parent from here on."""
    own = state(path)
    write_origin(path, Origin(state(parent).uuid, own.created, own.generation), namespace)


def freeze(path: str, read_only: bool) -> None:
    """Set the property `ro` of a subvolume. One that has it cannot be renamed either."""
    with opened_directory(path) as fd:
        if btrfs.is_read_only(fd) != read_only:
            btrfs.set_read_only(fd, read_only)


def thaw(path: str) -> None:
    """Let a subvolume be written and renamed; a directory that is none can be already."""
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
    """Let the subvolume refer to at most so many bytes, its parents' content included; 0: any.

    Turns on quota groups for the whole file system, if they are off: that takes a scan of it.
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
    """Whether other subvolumes lie in one."""
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
