"""A store is opened: adopted or refused, locked, laid out, its index read."""

import contextlib
import fcntl
import os
import time
from typing import Final

from aufsd.store.content import fsync
from aufsd.store.dialect import XattrNamespace
from aufsd.store.format import Format, Sync, read_format, write_format
from aufsd.store.index import read_index
from aufsd.store.layers import Store
from aufsd.store.layout import Layout
from aufsd_client.errors import StoreLocked, StoreNotAdopted

# a whole store may be walked by root and the remapped group only: 0701 let any user of the host
# run set-id files out of images (moby 03f1c3d78f, CVE-2021-41091)
_MODE: Final = 0o710
# a minute in all, for a disk that is slow to give back what waits for it
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

    Makes a store where the directory is empty. Raises StoreLocked if a process has it open, and
    StoreNotAdopted if it holds layers that aufsd did not make and `adopt` is false; then nothing
    was changed. Recovery is a step of its own: `recovery.recover`.
    """
    layout = Layout(root)
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
            os.chown(path, 0, gid)
            os.chmod(path, _MODE)
        for path in (
            layout.staging,
            layout.removing,
            layout.quarantine,
            layout.probes,
            f"{layout.private}/work",
        ):
            os.makedirs(path, 0o700, exist_ok=True)
        form = known or Format(adopted=foreign)
        if known is None:
            write_format(layout, form, sync)
            if sync != "none":
                fsync(root)
                fsync(os.path.dirname(root))
        index = read_index(layout, xattr_namespace)
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
        parent=index.parent,
        children=index.children(),
        damaged=index.damaged,
    )


def _has_layers(layout: Layout) -> bool:
    for path in (layout.layers, layout.diff):
        with contextlib.suppress(FileNotFoundError):
            if os.listdir(path):
                return True
    return False


def _lock(layout: Layout) -> int:
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
    """Wait until every archive job of the last daemon is gone; a descriptor that ours inherit.

    They are killed when their daemon dies, but one that waits for the disk ends only after that,
    and until then it may still write.
    """
    fd = os.open(layout.jobs_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
