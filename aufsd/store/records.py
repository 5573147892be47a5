"""The fingerprint that an apply records of a layer's content. Synchronous.

It is an xattr of the content directory. So it comes with the content in one rename, and goes with
it. Before a caller may write into the layer the record is deleted, so that an intended change is
not taken for damage. archive/fingerprint.py says what is in it.
"""

import os

from aufsd.store.dialect import Where, remove_xattr
from aufsd.store.format import Sync

_NAME = "aufsd.fingerprint"


def read(content: Where, namespace: str) -> str:
    """The record; "" if there is none."""
    try:
        return os.getxattr(content, f"{namespace}.{_NAME}").decode("ascii", "replace")
    except OSError:
        return ""


def write(content: Where, fingerprint: str, namespace: str) -> None:
    """Write the record; "" for none. Durable when the directory is synced. Raises OSError."""
    if fingerprint:
        os.setxattr(content, f"{namespace}.{_NAME}", fingerprint.encode())
    else:
        remove_xattr(content, f"{namespace}.{_NAME}")


def drop(content: int, namespace: str, sync: Sync) -> None:
    """Delete the record of the directory open as `content`, durably. Raises OSError."""
    if read(content, namespace):
        write(content, "", namespace)
        if sync != "none":
            os.fsync(content)
