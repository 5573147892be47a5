"""aufs, mounted with the options of Docker's driver, and with what that driver lacked.

mount(2) is called directly: libmount of util-linux 2.39 and newer goes through fsconfig(2), which
breaks aufs's `br:` syntax. Each layer has its own translation file (xino), in its work directory.
With one file for all mounts, concurrent mounts failed (moby#21545), and with the file on a tmpfs
old versions of aufs could loop forever (moby#18180).
"""

import errno
import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Final

from aufsd.kernel import mountinfo, syscalls
from aufsd.kernel import probe as host
from aufsd.kernel.log import KernelLog, open_log
from aufsd.store.dialect import Dialect, XattrNamespace
from aufsd.store.layout import Layout
from aufsd.store.opened import own_directory
from aufsd.store.whiteouts import HOUSEKEEPING
from aufsd.union import exclusive, plink, runner
from aufsd.union.backend import Union, Verdict
from aufsd.union.branches import MountCall, plan_aufs
from aufsd.union.causes import refused
from aufsd.union.scratch import scratch_dirs
from aufsd_client.errors import MountFailed, NoSpace

MAGIC: Final = syscalls.AUFS_SUPER_MAGIC
# include/uapi/linux/aufs_type.h: _IOW('A', AuCtl_BR, union aufs_brinfo); with a null pointer it
# counts the branches
_AUFS_CTL_BRINFO: Final = 0x50004105
# one union aufs_brinfo: id, permission, path
_BRINFO_SIZE: Final = 4096
_BRINFO_PATH: Final = 8
_BRINFO_SPARE: Final = 64
_HOUSEKEEPING: Final = tuple(os.fsdecode(name) for name in sorted(HOUSEKEEPING))
_BRANCH_MAXIMA: Final = (127, 511, 1023, 32767)


@dataclass(frozen=True, slots=True)
class Aufs:
    """The aufs backend, with what `probe` has found out."""

    options: tuple[str, ...]
    scratch: str
    log: KernelLog
    max_branches: int = _BRANCH_MAXIMA[0]
    facts: tuple[tuple[str, str], ...] = ()
    name: str = "aufs"
    dialect: Dialect = Dialect.AUFS
    snapshots: bool = False
    node_whiteouts: bool = False
    storage_options: frozenset[str] = frozenset()
    namespace: XattrNamespace = "trusted"
    # udba=reval, the default, looks again at a name in the branch that it came from, not in those
    # above it; udba=notify is for the kernels that were built with CONFIG_AUFS_HNOTIFY
    live_lower_warning: str = (
        "the parent is mounted read-write; of later writes to it aufs shows what was not looked at "
        "before in the new layer, and old content elsewhere, until that is mounted anew"
    )
    # the unions in sysfs at the last mount, by name and inode number
    _known: set[tuple[str, int]] = field(default_factory=set, repr=False)

    def plan(self, union: Union) -> tuple[MountCall, ...]:
        """As Backend.plan. aufs ignores an opaque root, so this does too."""
        return plan_aufs(
            union.target,
            (union.top, *union.lowers),
            work=union.work,
            read_only=union.read_only,
            options=self.options,
            label=union.label,
            limit=self.max_branches,
        )

    def mount(self, union: Union) -> None:
        """As Backend.mount. EBUSY: another live union, perhaps a detached one, has the branch."""
        calls = self.plan(union)
        with runner.prepared(union.id, calls[0], self.log):
            own_directory(union.work)
            with suppress(FileNotFoundError):
                # unlinked by aufs as soon as it is open; there only if the machine stopped then
                os.unlink(f"{union.work}/xino")
            if not union.read_only:
                exclusive.refuse_if_written(union, self.scratch, self.namespace)
                plink.discard(union.top)
            before = _times_at_risk(union)
        runner.run(union.id, calls, stands=self.is_mounted, log=self.log)
        try:
            if branch_count(union.target) != 1 + len(union.lowers):
                raise OSError(errno.EINVAL, "aufs mounted fewer branches than it was given")
            if before is not None:
                # in the branch: a time set through the union has whole seconds
                os.utime(union.top, ns=before)
        except OSError as error:
            failed = runner.failure(union.id, calls[-1], error, self.log)
            raise runner.undone(union.target, failed) from error
        if not union.read_only:
            for name, inode in self._new_union(union.target):
                device = os.lstat(union.target).st_dev
                exclusive.note(union.work, "aufs", name, inode, device)

    def _new_union(self, target: str) -> set[tuple[str, int]]:
        """The unions that are new in sysfs since the last mount, or that at `target`."""
        live = _unions()
        new = live - self._known
        self._known.clear()
        self._known.update(live)
        if len(new) == 1:
            return new
        # others mount too: mountinfo has the number of each
        shown = mountinfo.mounted_under(target)[-1:]
        names = [f"si_{row.super_options.partition('si=')[2].partition(',')[0]}" for row in shown]
        return {one for one in live if one[0] in names}

    def flush(self, target: str) -> None:
        """As Backend.flush: every pseudo-link becomes a real one."""
        plink.flush(target)

    def unmount(self, target: str, *, flush: bool = True) -> None:
        """As Backend.unmount."""
        plink.unmount(target, flush=flush)

    def is_mounted(self, target: str) -> bool:
        """As Backend.is_mounted."""
        return runner.is_mounted(target, MAGIC)

    def is_whole(self, union: Union) -> bool:
        """As Backend.is_whole: aufs is asked which branches it has."""
        if not self.is_mounted(union.target):
            return False
        return branches(union.target) == (union.top, *union.lowers)

    def is_part(self, union: Union) -> bool:
        """As Backend.is_part: the branches come from the uppermost down, some in each call."""
        if not self.is_mounted(union.target):
            return False
        shown, wanted = branches(union.target), (union.top, *union.lowers)
        return len(shown) < len(wanted) and shown == wanted[: len(shown)]

    def helper(self, target: str) -> tuple[int, int] | None:
        """As Backend.helper: none, the kernel serves it."""
        return None

    def clear(self, target: str) -> bool:
        """As Backend.clear: there is no helper to die."""
        return False


def probe(layout: Layout) -> Aufs | Verdict:
    """Make a trial mount on the store's file system, in `layout.probes`, and remove it again.

    Raises OSError if the store cannot be written at all.
    """
    if missing := host.missing_filesystem("aufs"):
        return Verdict(f"this kernel has no aufs ({missing.why})", passing=missing.unasked)
    # dirperm1 came late to aufs; the store decides, and not the file system of $TMPDIR
    for options in (("dio", "dirperm1"), ("dio",), ()):
        try:
            return _tried_out(Aufs(options, layout.probes, open_log()))
        except MountFailed as error:
            failed = error
            if error.data["errno"] != "EINVAL":
                break
        except (NoSpace, OSError) as error:
            return refused("aufs", layout.root, error)
    return refused("aufs", layout.root, failed)


def untried(layout: Layout, _: XattrNamespace) -> Aufs | Verdict:
    """As `probe`, without a trial: for a store that this has served before."""
    # a mount asks for the module too
    if (missing := host.missing_filesystem("aufs")) and not missing.unasked:
        return Verdict(f"this kernel has no aufs ({missing.why})")
    facts = (("dirperm1", "true"),)
    return Aufs(("dio", "dirperm1"), layout.probes, open_log(), facts=facts)


def _tried_out(backend: Aufs) -> Aufs:
    """Mount and use a trial union. The backend, with what that has shown."""
    with scratch_dirs(
        backend.scratch, "lower/d/hidden", "middle/d", "upper", "work", "merged"
    ) as at:
        os.mkdir(f"{at}/lower/gone")
        os.mkdir(f"{at}/lower/removed")
        for marker in ("gone", "d/.wh..opq"):
            head, _, tail = f"{at}/middle/{marker}".rpartition("/")
            with open(f"{head}/.wh.{tail}", "xb"):
                pass
        lowers = (f"{at}/middle", f"{at}/lower")
        union = Union("probe", f"{at}/upper", lowers, f"{at}/merged", f"{at}/work")
        backend.mount(union)
        try:
            names = sorted(os.listdir(union.target))
            if names != ["d", "removed"] or os.listdir(f"{union.target}/d"):
                raise OSError(errno.ENOTSUP, "whiteouts or opaque directories hide nothing")
            os.rmdir(f"{union.target}/removed")
            if not os.path.lexists(f"{union.top}/.wh.removed"):
                raise OSError(errno.ENOTSUP, "a removed directory leaves no whiteout")
            limit = _branch_max(union.target, f"{at}/work")
            facts = (
                ("dirperm1", "true" if "dirperm1" in backend.options else "false"),
                ("aufs_branch_max", str(limit)),
                ("aufs_xattrs", "true" if _takes_xattrs(union.target) else "false"),
                ("upper_in_use", "told" if _unions() else "unseen"),
            )
            return replace(backend, max_branches=limit, facts=facts)
        finally:
            backend.unmount(union.target)


def _times_at_risk(union: Union) -> tuple[int, int] | None:
    """The times of the branch's root, if this mount makes aufs's own entries in it.

    The entries would change the time of the layer's `/`, so the caller sets the times again. If the
    machine stops in between, only the time is lost.
    """
    if union.read_only or all(os.path.lexists(f"{union.top}/{name}") for name in _HOUSEKEEPING):
        return None
    found = os.stat(union.top)
    return found.st_atime_ns, found.st_mtime_ns


def _branch_max(target: str, directory: str) -> int:
    """AUFS_BRANCH_MAX of this kernel, a choice of four at its build.

    A branch can be added at a place: one past the maximum gives ENOSPC before aufs looks whether
    that place can be (EDOM: it is past the end). So nothing is added. test_add() in branch.c
    """
    for maximum in _BRANCH_MAXIMA:
        try:
            data = f"add:{maximum}:{directory}=ro"
            syscalls.mount("none", target, "aufs", syscalls.MS_REMOUNT, data)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return maximum
            if error.errno != errno.EDOM:
                break
        else:
            break
    return _BRANCH_MAXIMA[0]


def _takes_xattrs(target: str) -> bool:
    try:
        os.setxattr(target, "trusted.aufsd.probe", b"y")
    except OSError:
        return False
    return True


def branch_count(target: str) -> int:
    """How many branches the union mounted at `target` has. Raises OSError."""
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(root, _AUFS_CTL_BRINFO, 0)
    finally:
        os.close(root)


def branches(target: str) -> tuple[str, ...]:
    """The branches of the union mounted at `target`, the uppermost first. Raises OSError."""
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # au_brinfo() in fs/aufs/sysfs.c is not told how long the buffer is, and somebody may add
        # one meanwhile; it returns how many there are where it is given no buffer, and else 0
        room = fcntl.ioctl(root, _AUFS_CTL_BRINFO, 0) + _BRINFO_SPARE
        info = bytearray(room * _BRINFO_SIZE)
        fcntl.ioctl(root, _AUFS_CTL_BRINFO, info)
    finally:
        os.close(root)
    paths = (
        bytes(info[at + _BRINFO_PATH : at + _BRINFO_SIZE].partition(b"\0")[0])
        for at in range(0, len(info), _BRINFO_SIZE)
    )
    # what lies behind the last one is as it was made: without a path
    return tuple(mountinfo.unescape(path) for path in takewhile(bool, paths))


def _unions() -> set[tuple[str, int]]:
    """The live unions of the host, as sysfs has them: name and inode number of a directory."""
    try:
        with os.scandir(exclusive.SYSFS) as entries:
            return {(one.name, one.inode()) for one in entries if one.name.startswith("si_")}
    except FileNotFoundError:
        return set()
