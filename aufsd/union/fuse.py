"""fuse-overlayfs: overlayfs in user space, over layers in aufs's dialect.

With FUSE_OVERLAYFS_DISABLE_OVL_WHITEOUT=1 it reads and writes `.wh.NAME` and `.wh..wh..opq`, as
aufs does (1.5 and later also for renames). aufsd makes the mount and gives the program the open
/dev/fuse (`/dev/fd/N`, libfuse 3.3), because the program itself would ignore the `context=` of a
label. The program also keeps xattrs of its own in the branch; they are removed at the unmount.

A process serves each mount, and may be killed. Nothing here asks a mount whose process may be dead
or stuck. The exception is the first question to a new one, which has a deadline.
"""

import errno
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final

import structlog

from aufsd.kernel import mountinfo, syscalls
from aufsd.kernel import probe as host
from aufsd.kernel.log import KernelLog, open_log
from aufsd.kernel.peer import process
from aufsd.store.dialect import Dialect, XattrNamespace
from aufsd.store.erase import erase_at
from aufsd.store.ids import LayerId
from aufsd.store.layout import Layout
from aufsd.store.opened import own_directory
from aufsd.store.whiteouts import is_opaque_root
from aufsd.union import exclusive, helper, plink, runner
from aufsd.union.backend import NotFlushed, Union, Verdict
from aufsd.union.branches import LOWERS_MAX, MountCall, plan_fuse
from aufsd.union.causes import PASSING, refused
from aufsd.union.fuse_marks import strip
from aufsd.union.helper import Helper
from aufsd.union.scratch import scratch_dirs
from aufsd_client.errors import AufsdError, MountFailed, NoSpace

log = structlog.get_logger(__name__)

MAGIC: Final = syscalls.FUSE_SUPER_MAGIC
NAME: Final = "fuse-overlayfs"
_DEVICE: Final = "/dev/fuse"
_OLDEST: Final = (1, 5)
_ENVIRONMENT: Final = {"FUSE_OVERLAYFS_DISABLE_OVL_WHITEOUT": "1", "PATH": "/usr/bin:/bin"}
# for a helper to answer for the first time, and to end once nothing is mounted any more
_START_WITHIN: Final = 10.0  # seconds
_END_WITHIN: Final = 1.0  # seconds
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Fuse:
    """The fuse-overlayfs backend as `probe` found it.

    `program` is its path, `patience` the seconds that a new helper has to answer.
    """

    layout: Layout
    program: str
    namespace: XattrNamespace
    log: KernelLog
    facts: tuple[tuple[str, str], ...] = ()
    name: str = NAME
    dialect: Dialect = Dialect.AUFS
    snapshots: bool = False
    node_whiteouts: bool = True
    storage_options: frozenset[str] = frozenset()
    # the program has no limit; no other backend could mount a longer chain
    max_branches: int = LOWERS_MAX
    patience: float = _START_WITHIN
    live_lower_warning: str = (
        "the parent is mounted read-write, and fuse-overlayfs may not show later writes to it"
    )

    def plan(self, union: Union) -> tuple[MountCall, ...]:
        """As Backend.plan: the kernel's part, then the helper's options."""
        branches, known = (union.top, *union.lowers), union.opaque_roots
        for depth, branch in enumerate(branches, 1):
            opaque = branch in known if known is not None else self._is_opaque(branch)
            if opaque:
                branches = branches[:depth]
                break
        # the options that libfuse and fuse-overlayfs use themselves, with the ids of the daemon
        ids = ("rootmode=40000", f"user_id={os.geteuid()}", f"group_id={os.getegid()}")
        options = (*ids, "default_permissions", "allow_other")
        if union.read_only:
            return plan_fuse(union.target, branches, options=options, label=union.label)
        return plan_fuse(
            union.target,
            # one alone would be no union; a layer's parents never are none, but opaque ones are
            branches[1:] or (self._empty(),),
            upper=branches[0],
            work=union.work,
            options=options,
            label=union.label,
        )

    def _is_opaque(self, branch: str) -> bool:
        return is_opaque_root(branch, Dialect.AUFS, self.namespace)

    def _empty(self) -> str:
        empty = f"{self.layout.private}/empty"
        os.makedirs(empty, 0o755, exist_ok=True)
        return empty

    def mount(self, union: Union) -> None:
        """As Backend.mount. EBUSY: the helper of a union of this layer still runs."""
        kernel, served = self.plan(union)
        with runner.prepared(union.id, served, self.log):
            if helper.is_alive(union.work):
                raise exclusive.in_use(union)
            if not union.read_only:
                exclusive.refuse_if_written(union, self.layout.probes, self.namespace)
            own_directory(union.work)
            # left of a union that was unmounted by somebody else
            _let_go(self.layout, union.work, self.namespace)
            erase_at(f"{union.work}/work")
        self.log.mark()
        with ExitStack() as opened:
            device = _opened(opened, _DEVICE, os.O_RDWR)
            with (
                runner.explained(union.id, kernel, self.log),
                runner.mount_point(kernel.target) as target,
            ):
                syscalls.mount(
                    *(self.name, target, kernel.fstype, kernel.flags),
                    f"fd={device},{kernel.data}",
                )
            try:
                pid = self._serve(union, served, device, opened)
            except OSError as error:
                vanished = not _detach(union.target)
                failed = runner.failure(union.id, served, error, self.log)
                raise _vanished(failed) if vanished else failed from error
        # our descriptor of the connection is closed: it ends with the helper's
        try:
            _ask(union.target, self.patience)
        except OSError:
            self._give_up(union, served, pid)

    def _serve(self, union: Union, served: MountCall, device: int, opened: ExitStack) -> int:
        """Start the helper of the mount, and record it. Its pid."""
        runner.refuse_symlinks(served.dirs)
        names: list[str | int] = list(served.dirs)
        inherit = [device]
        if served.by_number:
            branches = [_opened(opened, path, os.O_PATH | os.O_DIRECTORY) for path in served.dirs]
            inherit += branches
            names = [f"/proc/self/fd/{fd}" for fd in branches]
        arguments = [self.program, "-f", "-o", served.render(names), f"/dev/fd/{device}"]
        pid = helper.start(union.work, arguments, _ENVIRONMENT, inherit)
        mounted = syscalls.statx_device(union.target)
        top = b"" if union.read_only else os.fsencode(union.top)
        helper.record(union.work, Helper(pid, process(pid)[1], mounted, top))
        return pid

    def _give_up(self, union: Union, served: MountCall, pid: int) -> None:
        vanished = not _detach(union.target)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        helper.wait(pid, process(pid)[1], _END_WITHIN)
        said = helper.said(union.work)
        helper.forget(union.work)
        # a helper without a message had no time to say anything
        why = said or f"{self.program} did not answer"
        error = OSError(errno.EINVAL if said else errno.ETIMEDOUT, why)
        failed = runner.failure(union.id, served, error, self.log)
        raise _vanished(failed) if vanished else failed

    def flush(self, target: str) -> None:
        """As Backend.flush: the kernel keeps written pages of a FUSE mount for a while."""
        if not self.is_mounted(target):
            plink.flush(target)
            return
        root = os.open(target, _DIRECTORY)
        try:
            syscalls.syncfs(root)
        except OSError as error:
            raise NotFlushed(error) from error
        finally:
            os.close(root)

    def unmount(self, target: str, *, flush: bool = True) -> None:
        """As Backend.unmount, for a union of the last backend too: those outlive the daemon.

        Its helper's own xattrs are taken from the branch, and a dead union is taken away.
        """
        work = self._work(target)
        if helper.is_alive(work):
            syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW)
            _let_go(self.layout, work, self.namespace)
        elif not self.clear(target):
            # unmounted behind our back, or never one of ours
            _let_go(self.layout, work, self.namespace)
            plink.unmount(target, flush=flush)

    def is_mounted(self, target: str) -> bool:
        """As Backend.is_mounted; also false if its helper has died. Does not ask the helper."""
        work = self._work(target)
        serving = helper.read(work) if helper.is_alive(work) else None
        return serving is not None and _is_device(target, serving.device)

    def is_whole(self, union: Union) -> bool:
        """As Backend.is_whole: its helper was given these branches, and its mount is known."""
        return self.is_mounted(union.target)

    def is_part(self, union: Union) -> bool:
        """As Backend.is_part: one call mounts all of it or nothing."""
        return False

    def helper(self, target: str) -> tuple[int, int] | None:
        """As Backend.helper."""
        found = helper.read(self._work(target))
        return (found.pid, found.start) if found else None

    def clear(self, target: str) -> bool:
        """As Backend.clear: a mount whose helper has died is detached.

        MNT_DETACH is safe for it, as it is for no other union: its connection is gone, so nobody
        can write its branch through it, whatever they still have open (every call of theirs is
        ENOTCONN). Without it, one process with a file open would keep the layer from coming back.
        """
        work = self._work(target)
        if helper.is_alive(work) or not _is_dead(target):
            return False
        _detach(target)
        _let_go(self.layout, work, self.namespace)
        return True

    def _work(self, target: str) -> str:
        return self.layout.work(LayerId(os.path.basename(target)))


def probe(layout: Layout) -> Fuse | Verdict:
    """Mount on the store's own file system, and look; what is made in `layout.probes` goes again.

    Raises OSError if the store cannot be written at all.
    """
    namespace: XattrNamespace = "user" if host.in_user_namespace() else "trusted"
    found = untried(layout, namespace)
    if isinstance(found, Verdict):
        return found
    os.makedirs(layout.probes, 0o700, exist_ok=True)
    ground = host.ground(layout.probes)
    if not ground.xattrs:
        return Verdict(
            f"the store's file system ({ground.kind}) takes neither trusted.* nor user.* xattrs",
            incompatible=True,
        )
    found = replace(found, namespace=ground.xattrs)
    try:
        _try_out(found)
    except (MountFailed, NoSpace, OSError) as error:
        return refused("fuse", layout.probes, error)
    return found


def untried(layout: Layout, namespace: XattrNamespace) -> Fuse | Verdict:
    """As `probe`, without a trial: for a store that this has served before."""
    program = shutil.which(NAME, path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/local/bin")
    if program is None:
        return Verdict(f"the program {NAME} is not installed")
    try:
        version = _version(program)
    except OSError:
        # the host lacks memory or descriptors: what was told of it at other times holds
        version = _OLDEST
    shown = ".".join(map(str, version)) or "unknown"
    if version < _OLDEST:
        return Verdict(f"{program} has the version {shown}; it has to be 1.5 or later")
    if "fuse" not in host.filesystems():
        with suppress(OSError):
            host.load_module("fuse")
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        passing = error.errno in PASSING
        return Verdict(f"{_DEVICE} cannot be opened: {error.strerror}", passing=passing)
    if ":" in layout.root or "\\" in layout.root:
        return Verdict(f"{NAME} takes no path with a colon or a backslash in it", incompatible=True)
    # a branch is known to be written by its helper, which can be asked for
    facts = ((NAME.replace("-", "_"), shown), ("upper_in_use", "helper"))
    return Fuse(layout, os.path.realpath(program), namespace, open_log(), facts)


def _try_out(backend: Fuse) -> None:
    """Mount a trial union and use it."""
    with scratch_dirs(backend.layout.probes) as at:
        layout = Layout(at)
        trial, id = replace(backend, layout=layout), LayerId("probe")
        for name in ("lower/d/hidden", "lower/gone", "lower/removed", "middle/d", "probe"):
            os.makedirs(f"{layout.diff}/{name}")
        os.makedirs(layout.mount_point(id))
        for marker in (".wh.gone", "d/.wh..wh..opq"):
            with open(f"{layout.diff}/middle/{marker}", "xb"):
                pass
        lowers = (f"{layout.diff}/middle", f"{layout.diff}/lower")
        target = layout.mount_point(id)
        union = Union(id, layout.content(id), lowers, target, layout.work(id))
        trial.mount(union)
        try:
            if sorted(os.listdir(target)) != ["d", "removed"] or os.listdir(f"{target}/d"):
                raise OSError(errno.ENOTSUP, "whiteouts or opaque directories hide nothing")
            os.rmdir(f"{target}/removed")
            if not os.path.isfile(f"{union.top}/.wh.removed"):
                raise OSError(errno.ENOTSUP, "a removed directory leaves no whiteout of aufs")
        finally:
            trial.unmount(target)


def _let_go(layout: Layout, work: str, namespace: XattrNamespace) -> None:
    """After an unmount, wait for the helper to end, and remove its xattrs from the branch.

    A helper that does not end serves a copy of the mount in another mount namespace. Its record
    stays, so that the layer is not mounted a second time.
    """
    found = helper.read(work)
    if found is not None:
        if not helper.wait(found.pid, found.start, _END_WITHIN) and helper.is_alive(work):
            log.info("a helper runs on, for another mount namespace", pid=found.pid)
            return
        top = layout.content(LayerId(os.path.basename(work)))
        try:
            if found.top:
                strip(top, namespace)
        except OSError as error:
            log.warning("a helper's marks stay in a layer", path=top, error=str(error))
    helper.forget(work)


@contextmanager
def _deadline(target: str, seconds: float) -> Iterator[None]:
    """A block in which a helper that does not answer is given up: its callers get ECONNABORTED.

    MNT_FORCE aborts the connection (fuse_umount_begin()), which works on a helper that cannot be
    killed too.
    """

    def abort() -> None:
        with suppress(OSError):
            syscalls.umount2(target, syscalls.MNT_FORCE)

    timer = threading.Timer(seconds, abort)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _ask(target: str, seconds: float) -> None:
    """Have the helper answer for the first time. Raises OSError if it does not."""
    with _deadline(target, seconds):
        magic = syscalls.statfs_type(target)
    if magic != MAGIC:
        raise OSError(errno.ENODEV, "another thing stands there")


def _detach(target: str) -> bool:
    """Detach a mount that nobody serves, without asking it. Whether it was there."""
    try:
        syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW | syscalls.MNT_DETACH)
    except OSError as error:
        # umount(2): it is no mount point
        return error.errno != errno.EINVAL
    return True


def _vanished(failed: AufsdError) -> runner.Vanished:
    return runner.Vanished(failed.message, **failed.data)


def _is_device(target: str, device: int) -> bool:
    try:
        return mountinfo.is_mount_point(target) and syscalls.statx_device(target) == device
    except FileNotFoundError:
        return False


def _is_dead(target: str) -> bool:
    """Whether a FUSE mount that nobody serves is at `target`; only for one without a helper."""
    try:
        if mountinfo.is_mount_point(target):
            syscalls.statfs_type(target)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _opened(opened: ExitStack, path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    return fd


def _version(program: str) -> tuple[int, ...]:
    """The version that the program prints; () if none. Raises OSError if it cannot be run now."""
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from error
    except OSError as error:
        if error.errno in PASSING:
            raise
        return ()
    found = re.search(r"fuse-overlayfs: version (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else ()
