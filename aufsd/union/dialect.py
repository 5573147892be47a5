"""The two ways to write a whiteout, and conversion between them."""

from enum import StrEnum


class Dialect(StrEnum):
    """How a layer's content says that a name is deleted or a directory is opaque.

    AUFS: `.wh.NAME` and `.wh..wh..opq` (Docker's store, OCI tars). OVERLAY: a character device
    0:0, and the xattr `overlay.opaque`.
    """

    AUFS = "aufs"
    OVERLAY = "overlay"
