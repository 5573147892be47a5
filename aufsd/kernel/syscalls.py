"""System calls that Python lacks, under their man-page names and argument order.

Each raises OSError(errno, strerror, path). Paths are str, encoded as the file system is. Nothing
here decides anything; constants carry the header they come from.
"""

import ctypes
import errno
import os
import platform
from typing import Final, NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)

# <sys/mount.h>
MS_RDONLY: Final = 0x1
MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_REMOUNT: Final = 0x20
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_UNBINDABLE: Final = 0x20000
MS_PRIVATE: Final = 0x40000
MS_SLAVE: Final = 0x80000
MS_SHARED: Final = 0x100000
MNT_FORCE: Final = 0x1
MNT_DETACH: Final = 0x2
UMOUNT_NOFOLLOW: Final = 0x8

# <linux/sched.h>
CLONE_FS: Final = 0x200
CLONE_NEWNS: Final = 0x20000
CLONE_NEWIPC: Final = 0x8000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

# <linux/fcntl.h>, <linux/mount.h>
AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000
AT_SYMLINK_NOFOLLOW: Final = 0x100
OPEN_TREE_CLONE: Final = 0x1
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
MOVE_MOUNT_T_SYMLINKS: Final = 0x10
MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8
RENAME_NOREPLACE: Final = 0x1
RENAME_EXCHANGE: Final = 0x2
# <linux/openat2.h>
RESOLVE_NO_XDEV: Final = 0x1
RESOLVE_NO_MAGICLINKS: Final = 0x2
RESOLVE_NO_SYMLINKS: Final = 0x4
RESOLVE_BENEATH: Final = 0x8
RESOLVE_IN_ROOT: Final = 0x10

# <linux/magic.h>; aufs: include/uapi/linux/aufs_type.h (AUFS_SUPER_MAGIC)
AUFS_SUPER_MAGIC: Final = 0x61756673
BTRFS_SUPER_MAGIC: Final = 0x9123683E
ECRYPTFS_SUPER_MAGIC: Final = 0xF15F
EXT_SUPER_MAGIC: Final = 0xEF53
FUSE_SUPER_MAGIC: Final = 0x65735546
NFS_SUPER_MAGIC: Final = 0x6969
OVERLAYFS_SUPER_MAGIC: Final = 0x794C7630
TMPFS_MAGIC: Final = 0x01021994
XFS_SUPER_MAGIC: Final = 0x58465342
ZFS_SUPER_MAGIC: Final = 0x2FC12FC1

# <linux/prctl.h>, <linux/capability.h>
PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
CAP_CHOWN: Final = 0
CAP_DAC_OVERRIDE: Final = 1
CAP_DAC_READ_SEARCH: Final = 2
CAP_FOWNER: Final = 3
CAP_FSETID: Final = 4
CAP_SYS_CHROOT: Final = 18
CAP_SYS_ADMIN: Final = 21
CAP_SYS_RESOURCE: Final = 24
CAP_MKNOD: Final = 27
CAP_SETFCAP: Final = 31
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522

# numbers of calls that glibc 2.31 does not wrap; the same on every architecture since Linux 5.1
# (include/uapi/asm-generic/unistd.h)
# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_ustat: Final = 136
_SYS_open_tree: Final = 428
_SYS_move_mount: Final = 429
_SYS_openat2: Final = 437
_SYS_mount_setattr: Final = 442


def _check(result: int, path: str | None = None) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def mount(source: str, target: str, fstype: str, flags: int, data: str = "") -> None:
    """mount(2). The kernel cuts `data` at one page without a word: the caller checks its length."""
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            os.fsencode(fstype) if fstype else None,
            ctypes.c_ulong(flags),
            os.fsencode(data) if data else None,
        ),
        target,
    )


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _check(_libc.pivot_root(os.fsencode(new_root), os.fsencode(put_old)), new_root)


def unshare(flags: int) -> None:
    """unshare(2); os.unshare exists from Python 3.12 only."""
    _check(_libc.unshare(flags))


def setns(fd: int, nstype: int) -> None:
    """setns(2); os.setns exists from Python 3.12 only."""
    _check(_libc.setns(fd, nstype))


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """open_tree(2): the caller owns the descriptor, and a cloned tree goes when it is closed."""
    return _check(_libc.syscall(_SYS_open_tree, dirfd, os.fsencode(path), flags), path)


class _OpenHow(ctypes.Structure):
    """struct open_how, version 0 (24 bytes)."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def openat2(dirfd: int, path: str | bytes, flags: int, *, resolve: int, mode: int = 0) -> int:
    """openat2(2), Linux 5.6: a descriptor that the caller closes; O_CLOEXEC is always set.

    `mode` only with O_CREAT. Raises OSError: EXDEV for a path that RESOLVE_BENEATH or
    RESOLVE_NO_XDEV forbids, ELOOP for a symlink that RESOLVE_NO_SYMLINKS does, EAGAIN where a
    rename or mount meanwhile makes it unsure (try again), ENOSYS on an older kernel.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    encoded = os.fsencode(path)
    return _check(
        _libc.syscall(_SYS_openat2, dirfd, encoded, ctypes.byref(how), ctypes.sizeof(how)),
        os.fsdecode(path),
    )


def move_mount(from_dirfd: int, from_path: str, to_dirfd: int, to_path: str, flags: int) -> None:
    """move_mount(2)."""
    source, target = os.fsencode(from_path), os.fsencode(to_path)
    _check(_libc.syscall(_SYS_move_mount, from_dirfd, source, to_dirfd, target, flags), to_path)


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount_setattr(
    dirfd: int, path: str, flags: int, *, attr_set: int = 0, propagation: int = 0
) -> None:
    """mount_setattr(2) (Linux 5.12)."""
    attr = _MountAttr(attr_set, 0, propagation, 0)
    _check(
        _libc.syscall(
            _SYS_mount_setattr,
            dirfd,
            os.fsencode(path),
            flags,
            ctypes.byref(attr),
            ctypes.c_size_t(ctypes.sizeof(attr)),
        ),
        path,
    )


def renameat2(old_dirfd: int, old: str, new_dirfd: int, new: str, flags: int) -> None:
    """renameat2(2)."""
    result = _libc.renameat2(old_dirfd, os.fsencode(old), new_dirfd, os.fsencode(new), flags)
    _check(result, old)


def getsockopt(fd: int, level: int, option: int, room: int) -> bytes:
    """getsockopt(2) for answers of up to `room` bytes; Python's own takes 1024 at most."""
    buffer, length = ctypes.create_string_buffer(room), ctypes.c_uint32(room)
    _check(_libc.getsockopt(fd, level, option, buffer, ctypes.byref(length)))
    return buffer.raw[: length.value]


def syncfs(fd: int) -> None:
    """syncfs(2): every dirty page and inode of the file system that `fd` lies on."""
    _check(_libc.syncfs(fd))


def prctl(option: int, argument: int) -> None:
    """prctl(2) with one argument."""
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(argument), zero, zero, zero))


class _Statfs(ctypes.Structure):
    # glibc's struct statfs on 64-bit; only the first two fields and the flags are read, the spare
    # covers the rest on every 64-bit architecture
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_long * 20))


def statfs_type(path: str | int) -> int:
    """f_type of statfs(2) or fstatfs(2): the magic number of the file system at `path`."""
    found = _Statfs()
    if isinstance(path, int):
        _check(_libc.fstatfs(path, ctypes.byref(found)))
    else:
        _check(_libc.statfs(os.fsencode(path), ctypes.byref(found)), path)
    return int(found.f_type) & 0xFFFFFFFF


def ustat(device: int) -> bool:
    """ustat(2): whether a live file system has this device number, mounted or detached.

    NotImplementedError where the architecture has no such call (it is obsolete).
    """
    if platform.machine() != "x86_64":
        raise NotImplementedError("ustat")
    # the kernel's 32-bit encoding of a device number, new_encode_dev() in linux/kdev_t.h
    major, minor = os.major(device), os.minor(device)
    number = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
    result = _libc.syscall(_SYS_ustat, ctypes.c_ulong(number), ctypes.create_string_buffer(64))
    if result == -1 and ctypes.get_errno() == errno.EINVAL:
        return False
    _check(result)
    return True


# <linux/stat.h>
_STATX_INO: Final = 0x100
_STATX_MNT_ID: Final = 0x1000
_STATX_MNT_ID_UNIQUE: Final = 0x4000
_STATX_ATTR_MOUNT_ROOT: Final = 0x2000
_AT_STATX_DONT_SYNC: Final = 0x4000
_AT_NO_AUTOMOUNT: Final = 0x800


class _Statx(ctypes.Structure):
    _fields_ = (
        ("stx_mask", ctypes.c_uint32),
        ("stx_blksize", ctypes.c_uint32),
        ("stx_attributes", ctypes.c_uint64),
        ("stx_nlink", ctypes.c_uint32),
        ("stx_uid", ctypes.c_uint32),
        ("stx_gid", ctypes.c_uint32),
        ("stx_mode", ctypes.c_uint16),
        ("spare0", ctypes.c_uint16),
        ("stx_ino", ctypes.c_uint64),
        ("stx_size", ctypes.c_uint64),
        ("stx_blocks", ctypes.c_uint64),
        ("stx_attributes_mask", ctypes.c_uint64),
        ("times", ctypes.c_uint64 * 8),
        ("stx_rdev_major", ctypes.c_uint32),
        ("stx_rdev_minor", ctypes.c_uint32),
        ("stx_dev_major", ctypes.c_uint32),
        ("stx_dev_minor", ctypes.c_uint32),
        ("stx_mnt_id", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 13),
    )


class MountRoot(NamedTuple):
    """What statx(2) says of a path: is it the root of a mount, and does this kernel tell."""

    known: bool
    mounted: bool


def statx_mount_root(path: str) -> MountRoot:
    """STATX_ATTR_MOUNT_ROOT (Linux 5.8) of `path`, without asking a network or FUSE server."""
    found = _statx(path)
    known = bool(found.stx_attributes_mask & _STATX_ATTR_MOUNT_ROOT)
    return MountRoot(known, bool(found.stx_attributes & _STATX_ATTR_MOUNT_ROOT))


def statx_device(path: str) -> int:
    """st_dev of `path`, without asking a network or FUSE server."""
    found = _statx(path)
    return os.makedev(found.stx_dev_major, found.stx_dev_minor)


class Place(NamedTuple):
    """Which file a path leads to, and in which mount (0 where the kernel has no STATX_MNT_ID)."""

    mount: int
    device: int
    inode: int


def statx_place(path: str) -> Place:
    """STATX_MNT_ID (Linux 5.8) and STATX_INO of `path`; no network or FUSE server is asked."""
    found = _statx(path, _STATX_INO | _STATX_MNT_ID)
    device = os.makedev(found.stx_dev_major, found.stx_dev_minor)
    known = found.stx_mask & _STATX_MNT_ID
    return Place(found.stx_mnt_id if known else 0, device, found.stx_ino)


class OpenFile(NamedTuple):
    """st_mode and st_dev of an open file."""

    mode: int
    device: int


def fstatx(fd: int) -> OpenFile:
    """What an open file is, without asking a network or FUSE server; O_PATH is enough for it."""
    found, flags = _Statx(), AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    _check(_libc.statx(fd, b"", flags, 0, ctypes.byref(found)))
    return OpenFile(found.stx_mode, os.makedev(found.stx_dev_major, found.stx_dev_minor))


class MountIds(NamedTuple):
    """What statx(2) says of the mount that a path lies in, and of the path itself.

    `id` (Linux 5.8) is mountinfo's, and given to another mount later; `unique` (Linux 6.8) never
    is. Each is 0 where the kernel has none.
    """

    root: MountRoot
    id: int
    unique: int
    device: int
    inode: int


def statx_mount_ids(path: str) -> MountIds:
    """STATX_MNT_ID and STATX_MNT_ID_UNIQUE of `path`; no network or FUSE server is asked."""
    found = _statx(path, _STATX_INO | _STATX_MNT_ID)
    root = MountRoot(
        bool(found.stx_attributes_mask & _STATX_ATTR_MOUNT_ROOT),
        bool(found.stx_attributes & _STATX_ATTR_MOUNT_ROOT),
    )
    # both in one call would be the unique one alone
    again = _statx(path, _STATX_MNT_ID_UNIQUE)
    return MountIds(
        root,
        found.stx_mnt_id if found.stx_mask & _STATX_MNT_ID else 0,
        again.stx_mnt_id if again.stx_mask & _STATX_MNT_ID_UNIQUE else 0,
        os.makedev(found.stx_dev_major, found.stx_dev_minor),
        found.stx_ino,
    )


def _statx(path: str, mask: int = 0) -> _Statx:
    found = _Statx()
    flags = AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC
    _check(_libc.statx(AT_FDCWD, os.fsencode(path), flags, mask, ctypes.byref(found)), path)
    return found


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


# made here and not per call: making the type takes longer than the call
_CapDataPair: Final = _CapData * 2


def capget() -> frozenset[int]:
    """capget(2): the capabilities that this process may have (permitted)."""
    header, data = _CapHeader(_LINUX_CAPABILITY_VERSION_3, 0), _CapDataPair()
    _check(_libc.capget(ctypes.byref(header), ctypes.byref(data)))
    bits = data[0].permitted | data[1].permitted << 32
    return frozenset(number for number in range(64) if bits >> number & 1)


def capset(capabilities: frozenset[int]) -> None:
    """capset(2): these capabilities permitted and effective, none inheritable, nothing else."""
    bits = sum(1 << capability for capability in capabilities)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    header = _CapHeader(_LINUX_CAPABILITY_VERSION_3, 0)
    data = _CapDataPair(_CapData(low, low, 0), _CapData(high, high, 0))
    _check(_libc.capset(ctypes.byref(header), data))


# <linux/falloc.h>
FALLOC_FL_KEEP_SIZE: Final = 0x1
FALLOC_FL_PUNCH_HOLE: Final = 0x2


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    _check(_libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))
