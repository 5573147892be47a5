"""Confines a child that handles archives of strangers to one directory, without privileges.

`prepare` runs once in the fork server, and every child inherits its effect. `isolate`, `enter` and
`drop` run in each child.
"""

import errno
import os
import resource
from typing import Final

from aufsd.kernel import seccomp
from aufsd.kernel import syscalls as sc

# <linux/capability.h>
_CAP_LAST: Final = 63
# owners, modes and devices as the archive has them, whoever owns the directory
WRITING: Final = frozenset(
    {
        sc.CAP_CHOWN,
        sc.CAP_DAC_OVERRIDE,
        sc.CAP_FOWNER,
        sc.CAP_FSETID,
        sc.CAP_MKNOD,
        sc.CAP_SETFCAP,
    }
)
READING: Final = frozenset({sc.CAP_DAC_READ_SEARCH})
# trusted.* xattrs: without it reading finds none, and writing is refused (xattr_permission())
TRUSTED_XATTRS: Final = frozenset({sc.CAP_SYS_ADMIN})
LABELLING: Final = frozenset({sc.CAP_DAC_OVERRIDE, sc.CAP_FOWNER, sc.CAP_SYS_ADMIN})
# of `enter` itself: chroot(2), mount_setattr(2)
_ENTERING: Final = frozenset({sc.CAP_SYS_CHROOT, sc.CAP_SYS_ADMIN})
# An archive child may make only these calls. A child that writes overlayfs's marks has
# CAP_SYS_ADMIN, with which it could otherwise mount something, and reach the host's disks.
_CALLS: Final = seccomp.compiled(seccomp.NUMBERS) if seccomp.is_known() else None
_HELD: Final = WRITING | READING | TRUSTED_XATTRS


def prepare(scratch: str) -> None:
    """Put this process into namespaces of its own, with an empty tmpfs for a root.

    Nothing of the host's file systems can be reached by a path afterwards: all that is needed has
    to be imported already, and no process but what is forked from this one's first child can be
    named. `scratch` is any directory; nothing is left in it. A child's own copy of a mount
    namespace with one mount costs 0.1 ms.
    """
    sc.unshare(sc.CLONE_NEWNS)
    for kind in (sc.CLONE_NEWNET, sc.CLONE_NEWIPC, sc.CLONE_NEWPID):
        try:
            sc.unshare(kind)
        except OSError as error:
            # a kernel built without it, or as many as there may be; the rest holds all the same
            if error.errno not in (errno.EINVAL, errno.ENOSPC):
                raise
    above, name = os.path.split(scratch)
    where = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _leave_chroot(scratch)
    sc.mount("none", "/", "", sc.MS_REC | sc.MS_PRIVATE)
    os.fchdir(where)
    os.close(where)
    sc.mount("none", name, "tmpfs", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC, "mode=0700")
    os.chdir(name)
    sc.pivot_root(".", ".")
    # the old root lies over the new one now: "." is the old (pivot_root(2), NOTES)
    sc.umount2(".", sc.MNT_DETACH)
    os.chdir("/")
    os.mkdir("/root", 0o700)
    for capability in range(_CAP_LAST + 1):
        if capability not in _HELD:
            try:
                sc.prctl(sc.PR_CAPBSET_DROP, capability)
            except OSError as error:
                # past this kernel's last one
                if error.errno != errno.EINVAL:
                    raise
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _leave_chroot(below: str) -> None:
    """Have the root of the mount namespace for a root; `below` is any directory.

    Where a daemon that runs in a chroot(2) has its root, nothing need be mounted, and then that can
    neither be made private nor pivoted away: EINVAL. What is mounted above would stay, too.
    """
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    # with the root below it, `..` of the working directory ends at the top of all mounts and no
    # sooner (chroot(2), NOTES)
    os.chroot(below)
    os.fchdir(root)
    os.close(root)
    while _at(".") != _at(".."):
        os.chdir("..")
    os.chroot(".")


def _at(path: str) -> tuple[int, int, int]:
    """Which directory it is: one of which a part is mounted at a part of it comes twice."""
    found = sc.statx_mount_ids(path)
    return found.id, found.device, found.inode


def isolate() -> None:
    """Give this process a mount namespace of its own, and no right that no job needs.

    Before `enter`. The calls that take longest in `enter` and `drop` are made once here, with
    nothing: a process's first takes it many times as long, and here nobody waits for it.
    """
    sc.unshare(sc.CLONE_NEWNS)
    sc.capset((_HELD | _ENTERING) & sc.capget())
    own = sc.open_tree(sc.AT_FDCWD, "/", sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC)
    os.close(_restricted(own, read_only=True))


def enter(root: int, *, read_only: bool, branches: int | None = None) -> int | None:
    """Make the detached mount `root` all that this process sees.

    `branches` is another detached mount, for reading through a descriptor only: returns one on its
    root. Neither is in any mount namespace, so nothing is above it, and `..` leads nowhere. Both
    descriptors stay open: with its last one a detached mount is gone.

    With pivot_root(2) the old root has to be unmounted, for which the kernel waits until every
    processor has been elsewhere (namespace_unlock() in fs/namespace.c): half of a small job's time.
    """
    found = None
    if branches is not None:
        branches = _restricted(branches, read_only=True)
        found = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=branches)
    root = _restricted(root, read_only=read_only)
    os.fchdir(root)
    os.chroot(".")
    return found


def drop(keep: frozenset[int], *, open_files: int) -> None:
    """Keep only these capabilities, and at most as many descriptors; fewer if the host says so.

    A container's root may lack some, CAP_MKNOD above all: then what needs it is refused. From here
    on the process makes only the system calls that reading and writing files take (on x86_64).
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY:
        open_files = min(open_files, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    sc.capset(keep & sc.capget())
    if _CALLS is not None:
        try:
            seccomp.install(_CALLS)
        except OSError as error:
            # a kernel built without it
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise


def _restricted(mount: int, *, read_only: bool) -> int:
    """A detached mount without devices, set-id bits and programs: this one, or one like it."""
    attributes = sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV | sc.MOUNT_ATTR_NOEXEC
    flags = sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC
    if read_only:
        attributes |= sc.MOUNT_ATTR_RDONLY
        flags |= sc.MS_RDONLY
    try:
        sc.mount_setattr(
            mount, "", sc.AT_EMPTY_PATH, attr_set=attributes, propagation=sc.MS_PRIVATE
        )
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    else:
        return mount
    # Linux before 5.12 does it by path alone
    sc.move_mount(mount, "", sc.AT_FDCWD, "/root", sc.MOVE_MOUNT_F_EMPTY_PATH)
    sc.mount("none", "/root", "", sc.MS_PRIVATE)
    sc.mount("none", "/root", "", sc.MS_REMOUNT | sc.MS_BIND | flags)
    return sc.open_tree(sc.AT_FDCWD, "/root", sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC)
