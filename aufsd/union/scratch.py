"""Temporary directories for a trial mount."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import structlog

from aufsd.kernel import mountinfo, syscalls
from aufsd.store.erase import erase_at
from aufsd.store.layout import TRIAL_LEFT

log = structlog.get_logger(__name__)


@contextmanager
def scratch_dirs(parent: str, *names: str) -> Iterator[str]:
    """A new directory in `parent` with these inside. The caller unmounts what it mounts there.

    Mounts that are still there at the end are detached.
    """
    os.makedirs(parent, 0o700, exist_ok=True)
    at = tempfile.mkdtemp(dir=parent)
    try:
        for name in names:
            os.makedirs(f"{at}/{name}")
        yield at
    finally:
        # the trial has told what it was for, whether or not this can be done
        if not (_deleted(at) or (_detached(at) and _deleted(at))):
            log.warning("what a trial mount used could not be deleted yet", path=at)
            with suppress(OSError):
                os.rename(at, f"{parent}/{TRIAL_LEFT}{os.path.basename(at)}")


def _detached(path: str) -> bool:
    """Take away the mounts that could not be unmounted: nobody but the trial ever used them."""
    with suppress(OSError):
        for row in reversed(mountinfo.mounted_under(path)):
            syscalls.umount2(row.mount_point, syscalls.UMOUNT_NOFOLLOW | syscalls.MNT_DETACH)
    return True


def _deleted(path: str) -> bool:
    try:
        return erase_at(path) is None
    except OSError:
        return False
