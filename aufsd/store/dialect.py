"""The dialect of a layer: which of the two ways its whiteouts are written in (whiteouts.py).

The dialect is an xattr on the layer's content directory. No xattr means aufs, so a store of
Docker's driver needs no change. `aufsd.union.conversion` rewrites a layer in another dialect.

`namespace` is that of the xattrs, "trusted" or "user". trusted.* needs CAP_SYS_ADMIN in the initial
user namespace. In another user namespace overlayfs is mounted with `userxattr` (Linux 5.11).
"""

import errno
import os
from enum import StrEnum
from typing import Final, Literal, TypeAlias


class Dialect(StrEnum):
    """How a layer's content marks a deleted name and an opaque directory.

    AUFS: `.wh.NAME` and `.wh..wh..opq`, as in Docker's store and OCI tars. OVERLAY: a character
    device 0:0, and the xattr `overlay.opaque`. NONE: not at all, because the layer is a snapshot
    that also holds its parents' content.
    """

    AUFS = "aufs"
    OVERLAY = "overlay"
    NONE = "none"


class UnknownMark(OSError):
    """A mark on a layer's root has no meaning, such as an unknown dialect; see `strerror`."""

    strerror: str


# a layer can be converted between these two
WITH_MARKS: Final = (Dialect.AUFS, Dialect.OVERLAY)

Where: TypeAlias = str | bytes | int | os.PathLike[str]
# the namespace of the xattrs
XattrNamespace = Literal["trusted", "user"]

_NO_XATTR: Final = (errno.ENODATA, errno.ENOTSUP)


def xattrs(dialect: Dialect, namespace: str) -> dict[str, bytes]:
    """The xattrs of the content directory of a layer in this dialect."""
    if dialect is Dialect.AUFS:
        return {}
    return {f"{namespace}.aufsd.dialect": dialect.value.encode()}


def read_dialect(where: Where, namespace: str) -> Dialect:
    """The dialect of a layer, by its content directory (path or descriptor).

    During a conversion it is still the old one. Raises UnknownMark, OSError.
    """
    return _parse(read_xattr(where, f"{namespace}.aufsd.dialect")) or Dialect.AUFS


def write_dialect(where: Where, dialect: Dialect, namespace: str) -> None:
    """Record the dialect of a layer. Raises OSError."""
    if dialect is Dialect.AUFS:
        remove_xattr(where, f"{namespace}.aufsd.dialect")
    else:
        os.setxattr(where, f"{namespace}.aufsd.dialect", dialect.value.encode())


def interrupted(where: Where, namespace: str) -> Dialect | None:
    """The target of a conversion that was interrupted; None if there is none.

    Until it is finished, the content may have marks of both dialects. Raises UnknownMark,
    OSError.
    """
    found = _parse(read_xattr(where, f"{namespace}.aufsd.converting"))
    if found is Dialect.NONE:
        raise UnknownMark(errno.EINVAL, "it says that it is converted to have no marks")
    return found


def mark_converting(where: Where, target: Dialect | None, namespace: str) -> None:
    """Mark that a conversion begins; None: that it is finished."""
    if target is None:
        remove_xattr(where, f"{namespace}.aufsd.converting")
    else:
        os.setxattr(where, f"{namespace}.aufsd.converting", target.value.encode())


def mark_settled(where: Where, namespace: str) -> None:
    """Mark a layer that lacks whiteouts, because they hid nothing of its parents."""
    os.setxattr(where, f"{namespace}.aufsd.settled", b"1")


def is_settled(where: Where, namespace: str) -> bool:
    """Whether a layer is marked so. Then its parents must not change. Raises OSError."""
    return read_xattr(where, f"{namespace}.aufsd.settled") is not None


def remove_xattr(where: Where, name: str) -> None:
    """removexattr(2), harmless if it is not there."""
    try:
        os.removexattr(where, name)
    except OSError as error:
        if error.errno not in _NO_XATTR:
            raise


def read_xattr(where: Where, name: str) -> bytes | None:
    """One xattr of a layer's content; None if it is not there. Raises OSError."""
    try:
        return os.getxattr(where, name)
    except OSError as error:
        if error.errno in _NO_XATTR:
            return None
        raise


def _parse(value: bytes | None) -> Dialect | None:
    if value is None:
        return None
    try:
        return Dialect(value.decode("ascii", "replace"))
    except ValueError as error:
        raise UnknownMark(errno.EINVAL, f"its dialect {value[:40]!r} is unknown") from error
