"""Full file systems and quotas."""

import errno
import os

from aufsd.store.ids import LayerId
from aufsd_client.errors import NoSpace


def no_space(error: OSError, id: LayerId) -> NoSpace | None:
    """The API's error for a full file system or quota."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"no space left for layer {id}: {error.strerror}", id=id)
    return None


def is_full(path: str) -> bool:
    """Whether the file system of `path` has no block or no inode left; False if not known."""
    try:
        found = os.statvfs(path)
    except OSError:
        return False
    # btrfs has no inode count and says 0
    return not found.f_bfree or bool(found.f_files and not found.f_ffree)
