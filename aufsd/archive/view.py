"""Merged views of chains of branches, without a mount. No symlink is followed.

The rule is that of overlayfs and OCI: from the top branch down, the first whiteout, opaque
directory or non-directory ends the merge. readings.py has the cases in which aufs differs.
"""

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from typing import Final

from aufsd.archive.requests import Branch
from aufsd.archive.twin import Twin
from aufsd.store.dialect import Dialect
from aufsd.store.walk import OPEN_AT_MOST, Descent, Way, between
from aufsd.store.whiteouts import marks_of
from aufsd.union import conversion

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# errors if a name was deleted since it was listed
GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
# directories that all branches of a walk have open together, as far as one of each leaves that room
_OPEN: Final = 512


class Layer:
    """One branch and its dialect."""

    __slots__ = ("_namespace", "id", "marks", "twin", "whole")

    def __init__(self, branch: Branch, root: int, namespace: str) -> None:
        self.id = branch.id
        self.marks = marks_of(root, branch.dialect, namespace)
        self.whole = branch.dialect is Dialect.NONE
        # of a whole layer: what it has in common with the one that it is compared with, if known
        self.twin: Twin | None = None
        self._namespace = namespace

    def mtime(self, fd: int, found: os.stat_result) -> int:
        """When a directory was changed, in nanoseconds: a conversion's own changes do not count."""
        half = self.marks.aufs and self.marks.overlay
        noted = conversion.noted_times(fd, self._namespace) if half else None
        return found.st_mtime_ns if noted is None else noted[1]


class Place:
    """Where a walk stands in one branch, which takes part in the merge there.

    `fd` is the directory. The walk has the same one on its way up again.
    """

    __slots__ = ("_descent", "fd", "layer")

    def __init__(self, layer: Layer, descent: Descent) -> None:
        self.layer = layer
        self._descent = descent
        self.fd = descent.fd

    @property
    def depth(self) -> int:
        """How many levels below the branch's root this is."""
        return self._descent.depth

    def down(self, name: bytes) -> None:
        """Go into a directory of this one. Raises OSError, and is where it was then."""
        self._descent.down(name)
        self.fd = self._descent.fd

    def up(self) -> None:
        """Go to the directory above; further if somebody moved directories meanwhile."""
        self._descent.up()
        self.fd = self._descent.fd

    def close(self) -> None:
        """Close the branch."""
        self._descent.close()


class Found:
    """What a merged view has under a name: the topmost entry, and where it lies.

    `beside` says that an aufs whiteout of the name stands beside it.
    """

    __slots__ = ("index", "place", "stat")

    def __init__(self, index: int, place: Place, found: os.stat_result) -> None:
        self.index = index
        self.place = place
        self.stat = found


def keep(branches: int) -> int:
    """How many directories of each branch may be open, if so many branches are walked at once."""
    return max(1, min(OPEN_AT_MOST, _OPEN // max(1, branches)))


def roots(store: int, chain: Sequence[Branch], namespace: str, *, beside: int = 0) -> list[Place]:
    """The roots of a chain's merged view; `store` is the directory that the branches lie in.

    `beside` are the branches of other views that are walked at the same time.
    """
    merged: list[Place] = []
    for branch in chain:
        place = root(store, branch, namespace, keep(len(chain) + beside))
        merged.append(place)
        if place.layer.whole or place.layer.marks.is_opaque(place.fd):
            break
    return merged


def root(store: int, branch: Branch, namespace: str, kept: int = OPEN_AT_MOST) -> Place:
    """The root of one branch; the caller closes it."""
    fd = os.open(branch.id, _DIRECTORY, dir_fd=store)
    try:
        return Place(Layer(branch, fd, namespace), Descent(fd, kept))
    finally:
        os.close(fd)


def lookup(merged: Sequence[Place], name: bytes) -> Found | None:
    """What the merged directory has under `name`."""
    for index, place in enumerate(merged):
        try:
            found = os.stat(name, dir_fd=place.fd, follow_symlinks=False)
        except FileNotFoundError:
            if place.layer.marks.hides(place.fd, name):
                return None
            continue
        gone = place.layer.marks.is_whiteout(name, found, place.fd)
        return None if gone else Found(index, place, found)
    return None


def descend(merged: Sequence[Place], name: bytes, top: Found) -> list[Place]:
    """Go into the directories that make up `name`, of which `top` was found: the places that did.

    The others stay where they are. `ascend` takes them back.
    """
    depth = merged[0].depth
    below: list[Place] = []
    try:
        for place in merged[top.index :]:
            hidden = place.layer.marks.hides(place.fd, name)
            try:
                place.down(name)
            except FileNotFoundError:
                if hidden:
                    break
                continue
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                # not a directory, or a symlink: what lies below it does not show
                break
            below.append(place)
            if hidden or place.layer.marks.is_opaque(place.fd):
                break
    except BaseException:
        ascend(below, depth)
        raise
    return below


def ascend(places: Iterable[Place], depth: int) -> int:
    """Go up with each of them to this level; the one that all reached.

    That is further up if somebody moved directories meanwhile.
    """
    reached = depth
    for place in places:
        while place.depth > depth:
            place.up()
        reached = min(reached, place.depth)
    return reached


class Cursor:
    """A place in a merged view that goes where it is asked to: a step costs the same at any depth.

    Whoever asks has one tree of ways; its top is the root of the view.
    """

    __slots__ = ("_at", "_levels", "_missing")

    def __init__(self, merged: Sequence[Place]) -> None:
        self._levels = [merged]
        self._at: Way | None = None
        # the last one that was asked for and is none
        self._missing: Way | None = None

    def find(self, way: Way) -> Sequence[Place]:
        """The directories that make up this one, none if it is none; until it is asked again."""
        if not self._levels[0] or way is self._missing:
            return ()
        if way.above is not None and way.above is self._missing:
            self._missing = way
            return ()
        ups, downs = between(self._at or Way(None, b""), way)
        if not self._up(len(self._levels) - 1 - ups):
            self._up(0)
            downs = way.names()
        left = len(downs)
        here = way
        for name in downs:
            merged = self._levels[-1]
            top = lookup(merged, name)
            if top is None or not stat.S_ISDIR(top.stat.st_mode):
                break
            below = descend(merged, name, top)
            if not below:
                break
            self._levels.append(below)
            left -= 1
        for _ in range(left):
            assert here.above is not None
            here = here.above
        self._at = here
        self._missing = way if left else None
        return () if left else self._levels[-1]

    def _up(self, depth: int) -> bool:
        """Go up to this level; False if directories were moved, and only the top is sure."""
        found = True
        while len(self._levels) - 1 > depth:
            left = self._levels.pop()
            found = ascend(left, len(self._levels) - 1) == len(self._levels) - 1 and found
        return found
