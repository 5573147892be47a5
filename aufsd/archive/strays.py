"""Finds names in a layer that look like marks, and are none in the layer's own dialect.

This is a part of the deep `check`. It walks content that users made. So it runs in an archive
child, or in the process that reads a store without a daemon.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from aufsd.archive import view
from aufsd.archive.requests import Branch
from aufsd.archive.view import Cursor
from aufsd.results import Problem
from aufsd.store import dialect as marks
from aufsd.store import whiteouts
from aufsd.store.dialect import Dialect
from aufsd.store.walk import Descent, walk

# names in one problem, and bytes that are shown of either end of a path
_NAMED: Final = 20
_SHOWN: Final = 2048


def problems(store: int, chain: Sequence[Branch], namespace: str) -> list[Problem]:
    """What is wrong in the own content of chain[0]: the first names of each kind, and how many.

    `store` is the directory that the branches lie in. The current directory is another one
    afterwards. What goes away meanwhile is passed over: the layer may be mounted. Raises OSError.
    """
    own, *parents = chain
    below = view.roots(store, parents, namespace, beside=1)
    place = view.root(store, own, namespace)
    found = _Found(own.id)
    try:
        if marks.interrupted(place.fd, namespace) is None:
            _look(place.fd, own.dialect, Cursor(below), namespace, found)
    finally:
        for each in (place, *below):
            each.close()
    return found.told()


@dataclass(slots=True)
class _Found:
    id: str
    named: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, here: Descent, name: bytes, what: str) -> None:
        count = self.counts[kind] = self.counts.get(kind, 0) + 1
        if count <= _NAMED:
            path = _cut(os.fsencode(here.path(name))).decode("utf-8", "backslashreplace")
            self.named.append(Problem(self.id, kind, f"{path}{what}", False))

    def told(self) -> list[Problem]:
        more = [
            Problem(self.id, kind, f"and {count - _NAMED} more names", False)
            for kind, count in self.counts.items()
            if count > _NAMED
        ]
        return [*self.named, *more]


def _cut(path: bytes) -> bytes:
    long = len(path) > 2 * _SHOWN
    return b"%b...%b" % (path[:_SHOWN], path[-_SHOWN:]) if long else path


def _look(top: int, dialect: Dialect, below: Cursor, namespace: str, found: _Found) -> None:
    opaque = whiteouts.opaque_xattr(namespace)
    elsewhere = {f"{namespace}.overlay.{name}" for name in ("redirect", "metacopy")}
    # of each directory on the way, whether nothing lies below it; None where nobody had to know
    alone: list[bool | None] = []
    for here in walk(top):
        os.fchdir(here.fd)
        del alone[here.depth :]
        above = bool(alone and alone[-1])
        hidden = here.depth > 0 and whiteouts.has_opaque_xattr(here.fd, namespace)
        alone.append(True if above or hidden else None)
        for entry in _entries():
            name = entry.name
            directory = entry.is_dir(follow_symlinks=False)
            if dialect is Dialect.AUFS and name == whiteouts.OPAQUE and not _is_file(entry):
                found.add("opaque-no-file", here, name, _NO_FILE)
            if directory:
                here.later(name)
            elif dialect is not Dialect.AUFS and whiteouts.deleted_name(name) is not None:
                found.add("mixed-dialects", here, name, " is an aufs whiteout")
            elif dialect is not Dialect.NONE and _is_node(entry):
                if dialect is Dialect.AUFS:
                    found.add("whiteout-device", here, name, _DEVICE)
                elif here.depth and _alone(alone, here, below):
                    found.add("listed-whiteout", here, name, _LISTED)
            if dialect is Dialect.NONE:
                # no union reads a snapshot: what says something to overlayfs is content, as where
                # somebody's own overlay has its branches in the layer
                continue
            try:
                xattrs = set(os.listxattr(name, follow_symlinks=False))
            except FileNotFoundError:
                continue
            if stray := xattrs & elsewhere:
                found.add("stray-xattr", here, name, f" has {', '.join(sorted(stray))}")
            # fuse-overlayfs's helper notes so for itself what it says in aufs's way beside it, and
            # takes the note back when the union is unmounted (union/fuse.py, strip)
            mixed = opaque in xattrs and dialect is not Dialect.OVERLAY
            if mixed and not (dialect is Dialect.AUFS and _says_opaque(name)):
                found.add("mixed-dialects", here, name, " is opaque as overlay says it")
            if dialect is Dialect.AUFS and _is_long(name):
                found.add("long-name", here, name, _LONG)


_LISTED: Final = (
    " is a whiteout in a directory with nothing below it, and shows as a name that nothing opens; "
    "converting the layer to aufs and back takes it away"
)
_DEVICE: Final = (
    " is a device 0:0: aufs shows it, overlayfs and fuse-overlayfs take it for a deleted name"
)
_NO_FILE: Final = (
    " is no regular file: fuse-overlayfs hides with it what lies below, and aufs fails on it; "
    "in a layer's root it stops every get"
)
_LONG: Final = ": aufs lists names of more than 242 bytes, and cannot open them"


def _entries() -> Iterator["os.DirEntry[bytes]"]:
    with os.scandir(b".") as entries:
        yield from entries


def _alone(alone: list[bool | None], here: Descent, below: Cursor) -> bool:
    """Whether overlayfs merges the directory with none below it."""
    known = alone[-1]
    if known is None:
        known = alone[-1] = not below.find(here.way)
    return known


def _is_file(entry: "os.DirEntry[bytes]") -> bool:
    return entry.is_file(follow_symlinks=False)


def _is_node(entry: "os.DirEntry[bytes]") -> bool:
    with suppress(FileNotFoundError):
        return whiteouts.is_node(entry)
    return False


def _says_opaque(name: bytes) -> bool:
    try:
        os.lstat(name + b"/" + whiteouts.OPAQUE)
    except OSError:
        return False
    return True


def _is_long(name: bytes) -> bool:
    return len(name) > whiteouts.AUFS_NAME_MAX and not name.startswith(whiteouts.WHITEOUT)
