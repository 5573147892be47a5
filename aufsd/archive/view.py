"""Merged views of chains of branches, from the branches alone: no mount, no symlink followed.

The strict rule: going down, the first whiteout, opaque directory or non-directory ends the merge
(what overlayfs shows and OCI means; aufs itself differs in corners, aufs-facts.md section 0).
"""

import errno
import os
import stat
from collections.abc import Sequence
from typing import Final

from aufsd.archive.requests import Branch
from aufsd.archive.twin import Twin
from aufsd.store import dialect as marks
from aufsd.store.dialect import Dialect
from aufsd.union import conversion

_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Layer:
    """How the directories of one branch are read: for aufs's marks, or for overlayfs's.

    For both while a conversion is half done.
    """

    __slots__ = (
        *("_namespace", "_whiteout_xattr", "aufs", "id", "opaque_xattr", "overlay", "twin"),
        "whole",
    )

    def __init__(self, branch: Branch, root: int, namespace: str) -> None:
        self.id = branch.id
        both = marks.interrupted(root, namespace) is not None
        self.aufs = both or branch.dialect is Dialect.AUFS
        self.overlay = both or branch.dialect is Dialect.OVERLAY
        self.whole = branch.dialect is Dialect.NONE
        # of a whole layer: what it has in common with the one that it is compared with, if known
        self.twin: Twin | None = None
        self.opaque_xattr = marks.opaque_xattr(namespace)
        self._namespace = namespace
        self._whiteout_xattr = marks.whiteout_xattr(root, namespace) if self.overlay else ""

    def mtime(self, fd: int, found: os.stat_result) -> int:
        """When a directory was changed, in nanoseconds: a conversion's own changes do not count."""
        noted = conversion.noted_times(fd, self._namespace) if self.aufs and self.overlay else None
        return found.st_mtime_ns if noted is None else noted[1]

    def is_opaque(self, fd: int) -> bool:
        """Whether the directory `fd` ends the merge."""
        if self.overlay and marks.has_opaque_xattr(fd, self._namespace):
            return True
        return self.aufs and _exists(fd, marks.OPAQUE)

    def hides(self, fd: int, name: bytes) -> bool:
        """Whether an aufs whiteout of `name` stands in the directory `fd`."""
        # .wh. and the name may be longer than a name can be
        return self.aufs and len(name) <= 251 and _exists(fd, marks.WHITEOUT + name)

    def is_whiteout(self, name: bytes, found: os.stat_result, directory: int | None) -> bool:
        """Whether the entry `name` of a directory, the current one if None, is overlayfs's."""
        if not self.overlay:
            return False
        if self._whiteout_xattr and stat.S_ISREG(found.st_mode) and not found.st_size:
            fd = os.open(name, _FILE, dir_fd=directory)
            try:
                return self._whiteout_xattr in os.listxattr(fd)
            finally:
                os.close(fd)
        return marks.is_whiteout_node(found)

    def may_be_whiteout(self, entry: "os.DirEntry[bytes]") -> bool:
        """What can be told of `is_whiteout` without asking the kernel."""
        if entry.is_file(follow_symlinks=False):
            return bool(self._whiteout_xattr)
        return self.overlay and not (entry.is_dir(follow_symlinks=False) or entry.is_symlink())


class Place:
    """A directory of one branch, that takes part in a merge."""

    __slots__ = ("fd", "layer")

    def __init__(self, layer: Layer, fd: int) -> None:
        self.layer = layer
        self.fd = fd

    def close(self) -> None:
        """Close the directory."""
        os.close(self.fd)


class Found:
    """What a merged view has under a name: the topmost entry, and where it lies.

    `beside` says that an aufs whiteout of the name stands beside it.
    """

    __slots__ = ("index", "place", "stat")

    def __init__(self, index: int, place: Place, found: os.stat_result) -> None:
        self.index = index
        self.place = place
        self.stat = found


def roots(store: int, chain: Sequence[Branch], namespace: str) -> list[Place]:
    """The roots of a chain's merged view; `store` is the directory that the branches lie in."""
    merged: list[Place] = []
    for branch in chain:
        place = root(store, branch, namespace)
        merged.append(place)
        if place.layer.whole or place.layer.is_opaque(place.fd):
            break
    return merged


def root(store: int, branch: Branch, namespace: str) -> Place:
    """The root of one branch; the caller closes it."""
    fd = os.open(branch.id, _DIRECTORY, dir_fd=store)
    return Place(Layer(branch, fd, namespace), fd)


def lookup(merged: Sequence[Place], name: bytes) -> Found | None:
    """What the merged directory has under `name`."""
    for index, place in enumerate(merged):
        try:
            found = os.stat(name, dir_fd=place.fd, follow_symlinks=False)
        except FileNotFoundError:
            if place.layer.hides(place.fd, name):
                return None
            continue
        gone = place.layer.is_whiteout(name, found, place.fd)
        return None if gone else Found(index, place, found)
    return None


def descend(merged: Sequence[Place], name: bytes, top: Found) -> list[Place]:
    """The directories that make up `name`, of which `top` was found; the caller closes them."""
    below: list[Place] = []
    for place in merged[top.index :]:
        try:
            fd = os.open(name, _DIRECTORY, dir_fd=place.fd)
        except FileNotFoundError:
            if place.layer.hides(place.fd, name):
                break
            continue
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            # not a directory, or a symlink: what lies below it does not show
            break
        below.append(Place(place.layer, fd))
        if place.layer.is_opaque(fd) or place.layer.hides(place.fd, name):
            break
    return below


def open_directory(merged: Sequence[Place], path: bytes) -> int | None:
    """The topmost directory that the merged view has at `path`; the caller closes it."""
    places = _reach(merged, path)
    try:
        return os.dup(places[0].fd) if places else None
    finally:
        _close(places)


class Directories:
    """Whether a merged view has directories, asked on a walk: one below the last costs no way."""

    __slots__ = ("_at", "_merged", "_path")

    def __init__(self, merged: Sequence[Place]) -> None:
        self._merged = merged
        self._path = b""
        self._at: Sequence[Place] = merged

    def has(self, path: bytes) -> bool:
        """Whether there is a directory of this path."""
        if not self._merged:
            return False
        below = self._path + b"/" if self._path else b""
        if path.startswith(below):
            found = _reach(self._at, path[len(below) :])
        else:
            found = _reach(self._merged, path)
        if found:
            self.close()
            self._path, self._at = path, found
        return bool(found)

    def close(self) -> None:
        """Let go of the last directory; the view stays its owner's."""
        if self._at is not self._merged:
            _close(self._at)
        self._path, self._at = b"", self._merged


def _reach(merged: Sequence[Place], path: bytes) -> list[Place]:
    """The directories that make up `path`, none if it is none; the caller closes them."""
    current: Sequence[Place] = merged
    try:
        for part in path.split(b"/"):
            top = lookup(current, part)
            if top is None or not stat.S_ISDIR(top.stat.st_mode):
                return []
            below = descend(current, part, top)
            if current is not merged:
                _close(current)
            current = below
        found, current = list(current), merged
        return found
    finally:
        if current is not merged:
            _close(current)


def _close(places: Sequence[Place]) -> None:
    for place in places:
        place.close()


def _exists(fd: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
