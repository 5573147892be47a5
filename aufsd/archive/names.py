"""Checks a name in a tar: where it is in the layer, or why it is refused. Pure.

The names of a union's own metadata are never content.
"""

from typing import Final

from aufsd.archive.meter import shown
from aufsd.store import whiteouts
from aufsd_client.errors import ArchiveEscape

ROOT: Final = b""
_ROUGH: Final = (b".", b"/")


def inside(name: bytes) -> bytes:
    """The name relative to the layer's root, without `.` and `..`; ROOT for the root itself.

    "" is the root too: some tools cut the prefix off its name, and leave nothing. Raises
    ArchiveEscape for a name that leaves the root on its way, even if it comes back.
    """
    if not name:
        return ROOT
    # the common case: nothing to clean
    bare = name[:-1] if name.endswith(b"/") else name
    if (
        bare[:1] not in _ROUGH
        and bare[-1:] != b"/"
        # `in` takes twice as long: it tries first whether what it looks for is a number
        and bare.find(b"//") < 0
        and bare.find(b"/.") < 0
    ):
        return bare
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise ArchiveEscape(f"{shown(name)} leaves the layer")
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def is_housekeeping(path: bytes) -> bool:
    """Whether this is one of aufs's own files at the top of a branch, or inside one."""
    return path.split(b"/", 1)[0] in whiteouts.HOUSEKEEPING


def is_pseudo_link(path: bytes) -> bool:
    """Whether this is the content of an aufs pseudo-link."""
    return path.startswith(whiteouts.PLINKS + b"/")


def check_content(path: bytes) -> None:
    """Raise ArchiveEscape if a part of the path is a name that union file systems keep."""
    if b".wh." not in path:
        return
    for part in path.split(b"/"):
        if part.startswith(whiteouts.WHITEOUT):
            raise ArchiveEscape(
                f"{shown(path)}: names that begin with .wh. stand for deleted files"
            )


def mark(path: bytes) -> bytes | None:
    """The name that the mark at `path` deletes, b"" for an opaque directory's; None for content.

    Raises ArchiveEscape for a mark that means nothing, and for one in a directory that is none.
    """
    if b".wh." not in path:
        return None
    directory, _, name = path.rpartition(b"/")
    check_content(directory)
    if not name.startswith(whiteouts.WHITEOUT):
        return None
    if name == whiteouts.OPAQUE:
        return b""
    deleted = whiteouts.deleted_name(name)
    if deleted is None:
        raise ArchiveEscape(
            f"{shown(path)} would be the union's own metadata, and means nothing here"
        )
    return deleted
