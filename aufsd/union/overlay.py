"""overlayfs: one mount call, always; whiteouts as devices, opaque directories by xattr.

With `index=off,metacopy=off,redirect_dir=nofollow` a layer does not refer to inodes of its parents,
and may be mounted over another copy of them (mkosi, containerd and Docker do the same). But then
the kernel lets two mounts write to one upper directory, so this module checks for that.
"""

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from aufsd.kernel import mountinfo, syscalls
from aufsd.kernel import probe as host
from aufsd.kernel.log import KernelLog, open_log
from aufsd.store.dialect import Dialect, XattrNamespace
from aufsd.store.erase import erase_at
from aufsd.store.layout import Layout
from aufsd.store.opened import own_directory
from aufsd.store.whiteouts import is_whiteout_node, opaque_xattr
from aufsd.union import exclusive, plink, runner
from aufsd.union.backend import Union, Verdict
from aufsd.union.branches import LOWERS_MAX, MountCall, plan_overlay
from aufsd.union.causes import refused
from aufsd.union.scratch import scratch_dirs
from aufsd_client.errors import MountFailed, NoSpace

MAGIC: Final = syscalls.OVERLAYFS_SUPER_MAGIC
# each with the module parameter that shows that the kernel knows it
_OPTIONS: Final = (
    ("index", "index=off"),
    ("metacopy", "metacopy=off"),
    ("redirect_dir", "redirect_dir=nofollow"),
)


@dataclass(frozen=True, slots=True)
class Overlay:
    """The overlay backend as `probe` found it.

    `empty` is a directory with nothing in it, `scratch` one for trial mounts.
    """

    namespace: XattrNamespace
    options: tuple[str, ...]
    empty: str
    scratch: str
    log: KernelLog
    facts: tuple[tuple[str, str], ...] = ()
    name: str = "overlay"
    dialect: Dialect = Dialect.OVERLAY
    snapshots: bool = False
    node_whiteouts: bool = True
    storage_options: frozenset[str] = frozenset()
    max_branches: int = LOWERS_MAX
    live_lower_warning: str = (
        "the parent is mounted read-write, and overlayfs may not show later writes to it"
    )

    def plan(self, union: Union) -> tuple[MountCall, ...]:
        """As Backend.plan: one call."""
        branches = self._merged(union)
        # overlayfs needs two directories, so an empty one is below a single layer
        if len(branches) == 1:
            branches = (*branches, self.empty)
        if union.read_only:
            call = plan_overlay(union.target, branches, options=self.options, label=union.label)
        else:
            call = plan_overlay(
                union.target,
                branches[1:],
                upper=branches[0],
                work=union.work,
                options=self.options,
                label=union.label,
            )
        return (call,)

    def _merged(self, union: Union) -> tuple[str, ...]:
        """The branches down to the first whose root is opaque.

        The kernel checks the mark of a directory when it looks the directory up in its parent. A
        root has no parent, so the kernel would merge the branches below all the same.
        """
        branches, known = (union.top, *union.lowers), union.opaque_roots
        for depth, branch in enumerate(branches, 1):
            if branch in known if known is not None else _is_opaque(branch, self.namespace):
                return branches[:depth]
        return branches

    def mount(self, union: Union) -> None:
        """As Backend.mount. EBUSY: another live mount, maybe a detached one, writes its branch."""
        calls = self.plan(union)
        if union.read_only:
            return runner.run(union.id, calls, stands=self.is_mounted, log=self.log)
        with runner.prepared(union.id, calls[0], self.log):
            exclusive.refuse_if_written(union, self.scratch, self.namespace)
            _clean_work(union.work)
        runner.run(union.id, calls, stands=self.is_mounted, log=self.log)
        if exclusive.says_in_use(self.log):
            # the line names no path, and another overlay mounted just now may have been meant
            gone = runner.undo(union.target)
            if not gone or exclusive.is_upper_in_use(union.top, self.scratch, self.namespace):
                raise exclusive.in_use(union)
            runner.run(union.id, calls, stands=self.is_mounted, log=self.log)
        return exclusive.note(union.work, "overlay", os.lstat(union.target).st_dev)

    def flush(self, target: str) -> None:
        """As Backend.flush: only for a union that was mounted by the last backend, aufs."""
        plink.flush(target)

    def unmount(self, target: str, *, flush: bool = True) -> None:
        """As Backend.unmount, also for a union of the last backend, which outlives the daemon."""
        plink.unmount(target, flush=flush)

    def is_mounted(self, target: str) -> bool:
        """As Backend.is_mounted."""
        return runner.is_mounted(target, MAGIC)

    def is_whole(self, union: Union) -> bool:
        """As Backend.is_whole: the branches are those that the kernel shows."""
        if not self.is_mounted(union.target):
            return False
        # not what is mounted inside
        rows = [
            row for row in mountinfo.mounted_under(union.target) if row.mount_point == union.target
        ]
        shown = shown_branches(rows[-1].super_options) if rows else ()
        expected = self._merged(union)
        return shown in ((), expected, (*expected, self.empty))

    def is_part(self, union: Union) -> bool:
        """As Backend.is_part: one call mounts all of it or nothing."""
        return False

    def helper(self, target: str) -> tuple[int, int] | None:
        """As Backend.helper: the kernel serves it."""
        return None

    def clear(self, target: str) -> bool:
        """As Backend.clear: nothing can die."""
        return False


def probe(layout: Layout) -> Overlay | Verdict:
    """Mount on the store's own file system, and look; what is made in `layout.probes` goes again.

    Raises OSError if the store cannot be written at all.
    """
    if missing := host.missing_filesystem("overlay"):
        return Verdict(f"this kernel has no overlayfs ({missing.why})", passing=missing.unasked)
    os.makedirs(layout.probes, 0o700, exist_ok=True)
    ground = host.ground(layout.probes)
    if not ground.xattrs:
        return Verdict(
            f"the store's file system ({ground.kind}) takes neither trusted.* nor user.* xattrs",
            incompatible=True,
        )
    if not ground.d_type:
        return Verdict(
            f"the store's file system ({ground.kind}) does not tell types of directory entries "
            "(d_type; xfs has to be made with ftype=1)",
            incompatible=True,
        )
    empty = f"{layout.private}/empty"
    os.makedirs(empty, 0o755, exist_ok=True)
    options = (*_known_options(), *exclusive.user_xattr(ground.xattrs))
    found = Overlay(ground.xattrs, options, empty, layout.probes, open_log())
    try:
        told = _try_out(found)
    except (MountFailed, NoSpace, OSError) as error:
        return refused("overlay", layout.probes, error)
    facts = (("overlay_options", ",".join(options)), ("upper_in_use", "told" if told else "unseen"))
    return replace(found, facts=facts)


def untried(layout: Layout, namespace: XattrNamespace) -> Overlay | Verdict:
    """As `probe`, without a trial: for a store that this has served before."""
    # a mount asks for the module too
    if (missing := host.missing_filesystem("overlay")) and not missing.unasked:
        return Verdict(f"this kernel has no overlayfs ({missing.why})")
    options = (*_known_options(), *exclusive.user_xattr(namespace))
    facts = (("overlay_options", ",".join(options)), ("upper_in_use", "unseen"))
    empty = f"{layout.private}/empty"
    return Overlay(namespace, options, empty, layout.probes, open_log(), facts)


def _try_out(backend: Overlay) -> bool:
    """Mount and use a trial union. Whether a second mount of its upper directory is found."""
    with scratch_dirs(
        backend.scratch, "lower", "middle/d", "upper", "work", "merged", "again"
    ) as at:
        os.makedirs(f"{at}/lower/d/hidden")
        os.mkdir(f"{at}/lower/copied")
        os.mkdir(f"{at}/lower/gone")
        os.mknod(f"{at}/middle/gone", stat.S_IFCHR, os.makedev(0, 0))
        os.setxattr(f"{at}/middle/d", f"{backend.namespace}.overlay.opaque", b"y")
        lowers = (f"{at}/middle", f"{at}/lower")
        union = Union("probe", f"{at}/upper", lowers, f"{at}/merged", f"{at}/work")
        backend.mount(union)
        try:
            if sorted(os.listdir(union.target)) != ["copied", "d"] or os.listdir(
                f"{union.target}/d"
            ):
                raise OSError(errno.ENOTSUP, "whiteouts or opaque directories hide nothing")
            os.rmdir(f"{union.target}/copied")
            if not is_whiteout_node(os.lstat(f"{union.top}/copied")):
                raise OSError(errno.ENOTSUP, "a removed directory leaves no whiteout")
            return "index" in _parameters() and exclusive.is_upper_in_use(
                union.top, backend.scratch, backend.namespace
            )
        finally:
            runner.undo(union.target)


def shown_branches(super_options: str) -> tuple[str, ...]:
    """The branches of a union, topmost first, by its row of mountinfo.

    () if they are shown as descriptor numbers: only aufsd mounts in that way.
    """
    upper: list[str] = []
    lowers: list[str] = []
    for option in super_options.split(","):
        name, _, value = option.partition("=")
        if name == "upperdir":
            upper = [value]
        elif name in ("lowerdir", "lowerdir+"):
            lowers += value.split(":")
    shown = (*upper, *lowers)
    return () if all(name.isdecimal() for name in shown) else shown


def _is_opaque(path: str, namespace: XattrNamespace) -> bool:
    name = opaque_xattr(namespace)
    try:
        # listxattr(2) succeeds in one call; getxattr(2) nearly always fails
        return name in os.listxattr(path) and os.getxattr(path, name) == b"y"
    except OSError:
        return False  # a missing branch: the mount fails, and says which


def _clean_work(work: str) -> None:
    """Have a work directory whose `work`, if it is there, is empty.

    The kernel makes `work` anew itself. What a crash left in it may stop the mount
    (incompat/volatile); to remove the directory each time would cost a third of the mount.
    """
    own_directory(work)
    try:
        if not os.listdir(f"{work}/work"):
            return
        left = erase_at(work)
        if left is not None:
            raise left.error()
    except FileNotFoundError:
        pass
    own_directory(work)


def _parameters() -> frozenset[str]:
    with suppress(OSError):
        return frozenset(os.listdir("/sys/module/overlay/parameters"))
    # no sysfs here: every kernel since 4.19 has all three
    return frozenset(name for name, _ in _OPTIONS)


def _known_options() -> tuple[str, ...]:
    known = _parameters()
    return tuple(option for name, option in _OPTIONS if name in known)
