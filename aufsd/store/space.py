"""What a full file system, or a quota, means to a caller."""

import errno

from aufsd.store.ids import LayerId
from aufsd_client.errors import NoSpace


def no_space(error: OSError, id: LayerId) -> NoSpace | None:
    """The API's error for a full file system or quota."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"no space left for layer {id}: {error.strerror}", id=id)
    return None
