"""What this host can do, found by trying it.

These are facts about the kernel and one directory's file system. Each backend in `union/` tries
itself what it can do with them. Nothing is cached, because a module may be loaded at any time.
"""

import errno
import os
import secrets
import stat
import subprocess
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from aufsd.kernel import syscalls

_MAGIC_NAMES: Final = {
    syscalls.AUFS_SUPER_MAGIC: "aufs",
    syscalls.BTRFS_SUPER_MAGIC: "btrfs",
    syscalls.ECRYPTFS_SUPER_MAGIC: "ecryptfs",
    syscalls.EXT_SUPER_MAGIC: "extfs",
    syscalls.FUSE_SUPER_MAGIC: "fuse",
    syscalls.NFS_SUPER_MAGIC: "nfs",
    syscalls.OVERLAYFS_SUPER_MAGIC: "overlayfs",
    syscalls.TMPFS_MAGIC: "tmpfs",
    syscalls.XFS_SUPER_MAGIC: "xfs",
    syscalls.ZFS_SUPER_MAGIC: "zfs",
}


@dataclass(frozen=True, slots=True)
class Host:
    """The kernel, and the rights of this process."""

    kernel: str
    root: bool
    user_namespace: bool
    selinux: bool
    filesystems: frozenset[str]
    module_versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Ground:
    """What one directory's file system offers to a store.

    `xattrs` is the namespace for a union's own xattrs, "" if neither works. `kind` is the name that
    Docker shows as Backing Filesystem.
    """

    path: str
    magic: int
    kind: str
    xattrs: Literal["trusted", "user", ""]
    d_type: bool
    whiteout_devices: bool


def host() -> Host:
    """Facts about the kernel."""
    return Host(
        kernel=os.uname().release,
        root=os.geteuid() == 0,
        user_namespace=in_user_namespace(),
        selinux=has_selinux(),
        filesystems=filesystems(),
        module_versions=tuple(
            (name, version) for name in ("aufs", "overlay") if (version := _module_version(name))
        ),
    )


def ground(path: str) -> Ground:
    """What the file system of the directory `path` offers. Makes a file in it, and removes it.

    Raises OSError where the directory cannot be written at all.
    """
    magic = syscalls.statfs_type(path)
    name = f"{path}/.aufsd-{secrets.token_hex(8)}"
    with open(name, "xb"):
        pass
    try:
        with os.scandir(path) as entries:
            made = next(entry for entry in entries if entry.path == name)
        xattrs = _xattr_namespace(name)
    finally:
        os.unlink(name)
    return Ground(
        path=path,
        magic=magic,
        kind=_kind(magic),
        xattrs=xattrs,
        # the file is deleted, so its type can only come from the directory entry
        d_type=made.is_file(follow_symlinks=False),
        whiteout_devices=_takes_whiteouts(name),
    )


def kind(path: str) -> str:
    """The name of the file system that `path` lies on; writes nothing."""
    return _kind(syscalls.statfs_type(path))


def _kind(magic: int) -> str:
    return _MAGIC_NAMES.get(magic, f"0x{magic:x}")


def filesystems() -> frozenset[str]:
    """The types in /proc/filesystems."""
    with open("/proc/filesystems", encoding="ascii") as file:
        return frozenset(line.split("\t")[1].strip() for line in file if "\t" in line)


class Missing(NamedTuple):
    """Why the kernel has no file system of a type; `unasked`: its module could not be asked for."""

    why: str
    unasked: bool = False


def missing_filesystem(name: str) -> Missing | None:
    """Why the kernel has no file system of this type, after asking for its module; None: it has."""
    if name in filesystems():
        return None
    try:
        tried = load_module(name)
    except OSError as error:
        return Missing(f"modprobe {name} could not be run: {error.strerror}", unasked=True)
    return None if name in filesystems() else Missing(tried or "the module has another type")


def in_user_namespace() -> bool:
    """Whether this is a user namespace other than the initial one, whose map is the identity."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return file.read().split() != ["0", "0", "4294967295"]


def has_capability(number: int) -> bool:
    """Whether this process may use a capability of <linux/capability.h> now."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next(line for line in file if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> number & 1)


def has_selinux() -> bool:
    """Whether SELinux is on and has a policy, so that a `context=` mount option is understood."""
    return os.path.exists("/sys/fs/selinux/policyvers") and _read("/sys/fs/selinux/enforce") != ""


def load_module(name: str) -> str:
    """Load a module by modprobe(8). "", or why it failed.

    Raises OSError if the program is there and could not be run: the host may lack memory or time.
    """
    if os.geteuid() != 0 or in_user_namespace():
        return "a module can be loaded by the host's root only"
    try:
        done = subprocess.run(
            ["modprobe", "--", name], capture_output=True, text=True, timeout=30, check=False
        )
    except (FileNotFoundError, PermissionError) as error:
        return f"modprobe {name} could not be run: {error}"
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from error
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        return f"modprobe {name} failed: {said}"
    return ""


def _xattr_namespace(path: str) -> Literal["trusted", "user", ""]:
    namespaces: tuple[Literal["trusted", "user"], ...] = ("trusted", "user")
    for namespace in namespaces:
        try:
            os.setxattr(path, f"{namespace}.overlay.aufsd", b"y")
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EACCES):
                raise
        else:
            return namespace
    return ""


def _takes_whiteouts(name: str) -> bool:
    try:
        os.mknod(name, stat.S_IFCHR, os.makedev(0, 0))
    except OSError:
        return False
    os.unlink(name)
    return True


def _module_version(name: str) -> str:
    return _read(f"/sys/module/{name}/version")


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""
