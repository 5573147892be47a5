"""Makes mount calls: opens descriptors, renders the data, checks the result.

Call it in the thread that is kept for mounts. The first call by descriptor number gives that thread
a working directory of its own (unshare(2), CLONE_FS) for good. If the main thread calls it, such a
call is made in a short-lived thread, because the main thread's working directory is the process's.
"""

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

from aufsd.kernel import mountinfo, syscalls
from aufsd.kernel.log import KernelLog
from aufsd.store.ids import LayerId
from aufsd.store.space import is_full, no_space
from aufsd.union.branches import DATA_MAX, MountCall
from aufsd.union.causes import likely_cause
from aufsd_client.errors import AufsdError, MountFailed, NoSpace

_BRANCH: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_UNDO_TRIES: Final = 10
_UNDO_PAUSE: Final = 0.05  # seconds
_this_thread = threading.local()


class Vanished(MountFailed):
    """Somebody else has unmounted the mount before it could be used. Mount it again."""


def run(
    id: str, calls: Sequence[MountCall], *, stands: Callable[[str], bool], log: KernelLog
) -> None:
    """Make the calls in order, and ask `stands` whether the target is mounted as planned.

    Raises MountFailed, Vanished; then nothing is left mounted.
    """
    log.mark()
    for number, call in enumerate(calls):
        try:
            _make(call)
        except OSError as error:
            failed = failure(id, call, error, log)
            raise (undone(call.target, failed) if number else failed) from error
    target = calls[-1].target
    if not stands(target):
        unseen = OSError(errno.ENODEV, "mounted without an error, but another thing stands there")
        raise undone(target, failure(id, calls[-1], unseen, log))


def _is_mount_point(target: str) -> bool:
    try:
        return mountinfo.is_mount_point(target)
    except FileNotFoundError:
        return False


def is_mounted(target: str, magic: int) -> bool:
    """Whether a file system of this type is mounted at `target`; False if nothing is there."""
    try:
        return _is_mount_point(target) and syscalls.statfs_type(target) == magic
    except FileNotFoundError:
        return False


def undo(target: str) -> bool:
    """Unmount a mount that was not given to anybody yet. Whether it is gone.

    A program that scans mounts may have it open for a moment, so this tries for half a second.
    """
    for _ in range(_UNDO_TRIES):
        try:
            syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno != errno.EBUSY:
                return True
        else:
            return True
        time.sleep(_UNDO_PAUSE)
    return False


def undone(target: str, failed: AufsdError) -> AufsdError:
    """Undo a mount that is not as planned. The error for it; Vanished if it is gone already."""
    if not _is_mount_point(target):
        return Vanished(failed.message, **failed.data)
    undo(target)
    return failed


@contextmanager
def explained(id: str, call: MountCall, log: KernelLog) -> Iterator[None]:
    """Turns an OSError of the block into the error of the mount."""
    try:
        yield
    except OSError as error:
        raise failure(id, call, error, log) from error


@contextmanager
def prepared(id: str, call: MountCall, log: KernelLog) -> Iterator[None]:
    """The same for preparations in the store, which may be full: NoSpace."""
    with explained(id, call, log):
        try:
            yield
        except OSError as error:
            raise no_space(error, LayerId(id)) or error from error


def failure(id: str, call: MountCall, error: OSError, log: KernelLog) -> MountFailed | NoSpace:
    """The error that explains why this call failed."""
    # the kernel makes directories too, and says ENOSPC of other things
    full = no_space(error, LayerId(id)) if any(map(is_full, call.dirs[:1])) else None
    if full is not None:
        return full
    lines = log.since()[-10:]
    cause = likely_cause(call, error, lines)
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    return MountFailed(
        f"mounting layer {id} as {call.fstype} failed with {name}: {cause}",
        id=id,
        errno=name,
        options=call.render(call.dirs),
        cause=cause,
        kernel_log=lines,
    )


def _make(call: MountCall) -> None:
    if not call.by_number:
        refuse_symlinks(call.dirs)
        _mount(call, call.render(call.dirs))
    elif threading.current_thread() is threading.main_thread():
        with ThreadPoolExecutor(max_workers=1) as other:
            other.submit(_make_by_number, call).result()
    else:
        _make_by_number(call)


def _make_by_number(call: MountCall) -> None:
    if not getattr(_this_thread, "own_directory", False):
        syscalls.unshare(syscalls.CLONE_FS)
        _this_thread.own_directory = True
    opened: list[int] = []
    try:
        for path in call.dirs:
            opened.append(os.open(path, _BRANCH))
        os.chdir("/proc/thread-self/fd")
        try:
            _mount(call, call.render(opened))
        finally:
            os.chdir("/")
    finally:
        for fd in opened:
            os.close(fd)


def _mount(call: MountCall, data: str) -> None:
    # the plan fits already; checked again, because the kernel would cut the rest without an error
    if len(os.fsencode(data)) > DATA_MAX:
        raise OSError(errno.E2BIG, "the options are longer than the kernel reads", call.target)
    with mount_point(call.target) as target:
        syscalls.mount("none", target, call.fstype, call.flags, data)


@contextmanager
def mount_point(path: str) -> Iterator[str]:
    """A mount point for mount(2), by descriptor: by path the kernel would follow a symlink.

    If something is mounted there, the descriptor is on that. Raises OSError (ENOTDIR).
    """
    fd = os.open(path, _BRANCH)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def refuse_symlinks(branches: Sequence[str]) -> None:
    """Raise OSError (ENOTDIR) if a branch is a symlink, which a union would follow."""
    for path in branches:
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "a symlink, which is not followed", path)
