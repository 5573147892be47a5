"""What an apply recorded of a layer's content: an xattr of the content, and so always with it.

It comes into the layer's place with the content that it is of, in the one rename, and goes with it.
Who is about to let somebody write into the layer drops it first, so that a change which is meant to
be is no damage. What it says is the business of archive/fingerprint.py. Synchronous.
"""

import os

from aufsd.store.dialect import Where, remove_xattr
from aufsd.store.format import Sync

_NAME = "aufsd.fingerprint"


def read(content: Where, namespace: str) -> str:
    """What is recorded; "" for nothing."""
    try:
        return os.getxattr(content, f"{namespace}.{_NAME}").decode("ascii", "replace")
    except OSError:
        return ""


def write(content: Where, fingerprint: str, namespace: str) -> None:
    """Record it; "" for nothing. Durable when the directory is synced. Raises OSError."""
    if fingerprint:
        os.setxattr(content, f"{namespace}.{_NAME}", fingerprint.encode())
    else:
        remove_xattr(content, f"{namespace}.{_NAME}")


def drop(content: int, namespace: str, sync: Sync) -> None:
    """Have nothing recorded of what is open as `content`, durably. Raises OSError."""
    if read(content, namespace):
        write(content, "", namespace)
        if sync != "none":
            os.fsync(content)
