"""Sealed layers: their content never changes again.

A layer is sealed if its parents file has mode 0444. So sealing is one change to one inode, a new
layer can be made sealed by its one rename, and the index needs no further system call to know it.
The size of the content is in an xattr of the content. It is written before the seal, and counts
only for a sealed layer.

Synchronous; the caller holds the transition of the id.
"""

import os
from contextlib import suppress
from typing import Final, NamedTuple

from aufsd.digits import number
from aufsd.kernel import btrfs
from aufsd.store import content as contents
from aufsd.store.dialect import remove_xattr
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.store.opened import content_of
from aufsd.store.space import no_space
from aufsd_client.errors import LayerSealed

SEALED: Final = 0o444
OPEN: Final = 0o644
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME: Final = "aufsd.usage"
_MOST: Final = (1 << 63) - 1


class Usage(NamedTuple):
    """Allocated bytes, and inodes, of a layer's own content."""

    size: int
    inodes: int


def is_frozen(store: Store, id: LayerId) -> bool:
    """Whether a layer is only given out read-only: it has children, or is sealed. From memory."""
    return id in store.children or id in store.sealed


def require_unsealed(store: Store, id: LayerId) -> None:
    """Raise LayerSealed if the layer is sealed. From memory."""
    if id in store.sealed:
        raise LayerSealed(
            f"layer {id} is sealed, and its content changes no more; make a layer on it", id=id
        )


def seal(store: Store, id: LayerId, usage: Usage) -> None:
    """Seal a layer whose content is synced. Durable if `sync` is not none. Raises NoSpace, OSError.

    A subvolume becomes read-only too.
    """
    store.identity.verify()
    content = store.layout.content(id)
    with content_of(store.identity, id) as fd:
        contents.thaw(content)
        # without space for the xattr, the content is counted again for each `usage`
        with suppress(OSError):
            value = f"{usage.size} {usage.inodes} {id}"
            os.setxattr(fd, f"{store.xattr_namespace}.{_NAME}", value.encode())
        try:
            if store.sync != "none":
                os.fsync(fd)
            if btrfs.is_subvolume(os.fstat(fd), fd):
                contents.freeze(content, True)
            _commit(store, id)
        except OSError as error:
            raise no_space(error, id) or error from error
    store.sealed.add(id)


def _commit(store: Store, id: LayerId) -> None:
    file = os.open(store.layout.parents_file(id), _FILE)
    try:
        os.fchmod(file, SEALED)
        if store.sync != "none":
            try:
                os.fsync(file)
            except OSError:
                os.fchmod(file, OPEN)
                raise
    finally:
        os.close(file)


def read_usage(store: Store, id: LayerId) -> Usage | None:
    """The recorded size of a sealed layer; None without a record, or if it is not sealed."""
    if id not in store.sealed:
        return None
    try:
        with content_of(store.identity, id) as fd:
            text = os.getxattr(fd, f"{store.xattr_namespace}.{_NAME}")
    except OSError:
        return None
    size, _, rest = text.partition(b" ")
    inodes, _, counted = rest.partition(b" ")
    found = number(size, _MOST), number(inodes, _MOST)
    # a snapshot has the xattrs of its parent
    if counted != id.encode() or found[0] is None or found[1] is None:
        return None
    return Usage(found[0], found[1])


def forget_usage(store: Store, id: LayerId) -> None:
    """Delete the recorded size, before a conversion changes the content."""
    with content_of(store.identity, id) as fd:
        remove_xattr(fd, f"{store.xattr_namespace}.{_NAME}")
