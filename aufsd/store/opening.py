"""Opens a store: refuses or adopts it, locks it, makes its directories, reads its index."""

import contextlib
import errno
import fcntl
import os
import stat
import time
from typing import Final

from aufsd.kernel.beneath import DIRECTORY, open_beneath
from aufsd.store import subvolumes
from aufsd.store.content import fsync, opened_directory
from aufsd.store.dialect import XattrNamespace
from aufsd.store.format import Format, Sync, new_id, read_format, write_format
from aufsd.store.identity import identify
from aufsd.store.index import read_index
from aufsd.store.layers import Store
from aufsd.store.layout import Layout
from aufsd.store.replacing import resume
from aufsd_client.errors import IncompatibleFilesystem, StoreLocked, StoreNotAdopted

# only root and the remapped group may enter a store: with mode 0701 any user of the host could run
# set-id files of images (moby 03f1c3d78f, CVE-2021-41091)
_MODE: Final = 0o710
# names in a root whose first start was interrupted, and on a new file system
_OWN: Final = frozenset({"layers", "diff", "mnt", ".aufsd", "lost+found"})
_PRIVATE: Final = tuple(
    f".aufsd/{name}" for name in ("staging", "removing", "quarantine", "probes", "work", "empty")
)
# a minute in all, for processes that wait for a slow disk
_JOBS_TRIES: Final = 6000
_JOBS_PAUSE: Final = 0.01  # seconds


def open_store(
    root: str,
    *,
    adopt: bool,
    sync: Sync = "filesystem",
    uid: int = 0,
    gid: int = 0,
    xattr_namespace: XattrNamespace = "trusted",
) -> Store:
    """Lock the store at `root` (absolute, resolved, existing) and read its index.

    Makes a store if the directory is empty. Raises StoreLocked if another process has it open.
    Raises StoreNotAdopted if it has layers that aufsd did not make and `adopt` is false, or if it
    is neither empty nor a store; then nothing was changed. Raises IncompatibleFilesystem if its
    directories are not in one mount. Recovery comes later: `recovery.recover`.
    """
    layout = Layout(root)
    refuse_what_is_no_store(layout)
    known = read_format(layout)
    foreign = known is None and _has_layers(layout)
    if foreign and not adopt:
        raise StoreNotAdopted(
            f"{root} holds layers that aufsd did not make; start once with --adopt to serve them",
            root=root,
        )
    os.makedirs(layout.private, 0o700, exist_ok=True)
    lock_fd = _lock(layout)
    jobs_fd = -1
    try:
        jobs_fd = _wait_for_jobs(layout)
        for path in (root, layout.layers, layout.diff, layout.mnt):
            os.makedirs(path, _MODE, exist_ok=True)
            with opened_directory(path) as fd:
                found = os.fstat(fd)
                # write nothing that need not be written: the disk may be full, or read-only
                if (found.st_uid, found.st_gid) != (0, gid):
                    os.chown(fd, 0, gid)
                if stat.S_IMODE(found.st_mode) != _MODE:
                    os.chmod(fd, _MODE)
        for path in (
            layout.staging,
            layout.removing,
            layout.quarantine,
            layout.probes,
            f"{layout.private}/work",
        ):
            os.makedirs(path, 0o700, exist_ok=True)
        form = known or Format(adopted=foreign)
        if not form.id:
            _give_id(layout, form, sync, needed=known is None)
        if known is None and sync != "none":
            fsync(root)
            fsync(os.path.dirname(root))
        resumed = [*resume(layout), *subvolumes.resume(layout, xattr_namespace)]
        index = read_index(layout, xattr_namespace)
        identity = identify(layout)
    except BaseException:
        if jobs_fd >= 0:
            os.close(jobs_fd)
        os.close(lock_fd)
        raise
    return Store(
        layout=layout,
        sync=sync,
        uid=uid,
        gid=gid,
        format=form,
        xattr_namespace=xattr_namespace,
        lock_fd=lock_fd,
        jobs_fd=jobs_fd,
        identity=identity,
        parent=index.parent,
        children=index.children(),
        damaged=index.damaged,
        created=index.created,
        sealed=index.sealed,
        resumed=resumed,
    )


def refuse_what_is_no_store(layout: Layout) -> None:
    """Raise if the root is neither empty nor a store that can be served. Changes nothing.

    Anybody may have prepared the store. So no symlink is followed, and the files that mark it as
    made by aufsd count only if root wrote them.
    """
    root = os.open(layout.root, DIRECTORY)
    try:
        names = frozenset(os.listdir(root))
        if layout.root == "/" or not (names <= _OWN or {"layers", "diff"} <= names):
            raise StoreNotAdopted(
                f"{layout.root} is neither empty nor a store: nothing was changed; "
                "is it the right directory?",
                root=layout.root,
            )
        for path in ("layers", "diff", "mnt", ".aufsd", *_PRIVATE):
            with contextlib.suppress(FileNotFoundError):
                _refuse_unless_inside(layout, root, path)
        for path in (".aufsd", ".aufsd/format", ".aufsd/lock", ".aufsd/jobs"):
            with contextlib.suppress(FileNotFoundError):
                _refuse_unless_ours(layout, path)
    finally:
        os.close(root)


def _refuse_unless_inside(layout: Layout, root: int, path: str) -> None:
    try:
        os.close(open_beneath(root, path))
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise IncompatibleFilesystem(
                f"{layout.root}/{path} is a mount: all of a store has to lie in one, for what is "
                "renamed between its directories; mount the other disk at the root instead",
                root=layout.root,
            ) from error
        raise StoreNotAdopted(
            f"{layout.root}/{path} is no directory, or leads through a symlink, which a store's "
            "may not: move what it leads to here",
            root=layout.root,
        ) from error


def _refuse_unless_ours(layout: Layout, path: str) -> None:
    """Refuse the store if anybody but root wrote its marks, or may write them."""
    found = os.lstat(f"{layout.root}/{path}")
    regular = stat.S_ISREG(found.st_mode) or path == ".aufsd"
    if not regular or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise StoreNotAdopted(
            f"{layout.root}/{path} was not made by aufsd ({stat.filemode(found.st_mode)}, owner "
            f"{found.st_uid}): somebody else prepared this store; move {layout.private} away",
            root=layout.root,
        )


def _give_id(layout: Layout, form: Format, sync: Sync, *, needed: bool) -> None:
    """Write an id into the store's file. A store of an older aufsd may have none."""
    form.id = new_id()
    try:
        write_format(layout, form, sync)
    except OSError:
        if needed:
            raise
        # the disk is full, or read-only
        form.id = ""


def _has_layers(layout: Layout) -> bool:
    for path in (layout.layers, layout.diff):
        with contextlib.suppress(FileNotFoundError):
            if os.listdir(path):
                return True
    return False


def _lock(layout: Layout) -> int:
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise StoreLocked(
            f"another process serves {layout.root}; `fuser {layout.lock}` says which",
            root=layout.root,
        ) from error
    return fd


def _wait_for_jobs(layout: Layout) -> int:
    """Wait until every archive job of the last daemon has ended. A descriptor for ours to inherit.

    Jobs are killed when their daemon dies. A job that waits for the disk ends only when the disk
    has answered, and may write until then.
    """
    fd = os.open(layout.jobs_lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    for _ in range(_JOBS_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_JOBS_PAUSE)
        else:
            return fd
    os.close(fd)
    raise StoreLocked(
        f"archive jobs of the last daemon still write to {layout.root}; "
        f"`fuser {layout.jobs_lock}` says which",
        root=layout.root,
    )
