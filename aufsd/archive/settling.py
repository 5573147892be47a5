"""Decides which whiteouts a layer keeps: those in directories that have something below to hide.

overlayfs merges a directory only if a lower branch has it too. It lists any other directory as it
is on disk (ovl_iterate() in fs/overlayfs/readdir.c). So a whiteout in a directory that is opaque,
or new in its layer, is listed as a name that cannot be opened, and `ls`, `find` and `tar` fail on
it. Such a whiteout hides nothing, so it is not kept. The layer's root is always merged.
"""

import os
from collections.abc import Callable, Iterator
from typing import Final

from aufsd.archive.directories import Directory
from aufsd.archive.meter import shown
from aufsd.archive.tree import Tree
from aufsd.kernel.beneath import DIRECTORY
from aufsd.store import whiteouts
from aufsd.store.dialect import Dialect
from aufsd.store.walk import Names, Way, walk, way_of
from aufsd_client.errors import LimitExceeded

# bytes of whiteouts whose directory is not there yet
_WAITING_MAX: Final = 16 << 20
# whether the layers below show this directory
Below = Callable[[Way], bool]


def nowhere(_: Way) -> bool:
    """For a layer with none below it."""
    return False


class Waiting:
    """Whiteouts in directories that the archive has not made yet, and may never make.

    A directory in which nothing but a whiteout lies is no content: it is made only where the layers
    below have one, from which something is hidden.
    """

    def __init__(self) -> None:
        # directory and name, one after the other
        self._rows = Names()
        self._held = 0
        # whether some of them hid nothing, once all were asked for
        self.left_out = False

    def add(self, directory: bytes, name: bytes) -> None:
        """Keep one for later. Raises LimitExceeded."""
        self._rows.add(directory)
        self._rows.add(name)
        self._held += len(directory) + len(name) + 2
        if self._held > _WAITING_MAX:
            raise LimitExceeded(
                "too many whiteouts lie in directories that the archive has not put before them, "
                f"such as {shown(directory)}"
            )

    def those_to_make(self, tree: Tree, lies_below: Below) -> Iterator[tuple[bytes, bytes]]:
        """Directory and name of those that hide something, each to be made before the next."""
        opaque = _Opaque(tree)
        path = way = None
        for directory, name in zip(self._rows, self._rows, strict=True):
            # of those in one directory, one way is asked for
            if way is None or directory != path:
                path, way = directory, way_of(directory)
            if tree.reach(directory) or _shows_below(tree, directory, way, lies_below, opaque):
                yield directory, name
            else:
                self.left_out = True


def settle(tree: Tree, lies_below: Below) -> int:
    """Take away the whiteouts of this archive that hide nothing; how many those were."""
    if tree.marked_more:
        return _settle_all(tree, lies_below)
    taken = 0
    opaque = _Opaque(tree)
    for directory in list(tree.marked.values()):
        if directory is tree.root or (not opaque.cuts(directory) and lies_below(directory.way)):
            continue
        tree.go(directory)
        taken += _take_away(tree.dialect)
    return taken


def _settle_all(tree: Tree, lies_below: Below) -> int:
    """The same where nobody knows any more in which directories whiteouts were made."""
    taken = 0
    # of each directory on the way, whether what it holds has nothing below it
    cut: list[bool] = []
    top = os.open(b"/", DIRECTORY)
    for here in walk(top):
        os.fchdir(here.fd)
        tree.moved()
        del cut[here.depth :]
        cut.append(tree.is_opaque() or (here.depth > 0 and cut[-1]))
        if here.depth:
            cut[-1] = cut[-1] or not lies_below(here.way)
            if cut[-1]:
                taken += _take_away(tree.dialect)
        with os.scandir(b".") as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    here.later(entry.name)
    os.close(top)
    tree.go(tree.root)
    return taken


def _take_away(dialect: Dialect) -> int:
    """Remove every whiteout in the current directory, which keeps its time; how many there were."""
    before = os.stat(b".").st_mtime_ns
    found = Names()
    with os.scandir(b".") as entries:
        for entry in entries:
            if whiteouts.is_whiteout(entry, dialect):
                found.add(entry.name)
    count = 0
    for name in found:
        os.unlink(name)
        count += 1
    if count:
        # it may be one that has got its time already
        os.utime(b".", ns=(before, before))
    return count


class _Opaque:
    """Which directories are opaque, or lie in one that is; each is looked at once."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._known: dict[int, bool] = {}

    def cuts(self, directory: Directory) -> bool:
        """Whether it is opaque, or one on the way to it from the root."""
        known = self._known
        unknown = []
        here: Directory | None = directory
        while here is not None and here.inode not in known:
            unknown.append(here)
            here = here.above
        cut = here is not None and known[here.inode]
        for directory in reversed(unknown):
            if not cut:
                self._tree.go(directory)
                cut = self._tree.is_opaque()
            known[directory.inode] = cut
        return cut


def _shows_below(tree: Tree, path: bytes, way: Way, lies_below: Below, opaque: _Opaque) -> bool:
    """Whether a directory that this layer does not have shows from below."""
    if not lies_below(way):
        return False
    name = tree.approach(path)
    # neither a file nor a whiteout of it may stand in the way
    return not tree.says(name) and not opaque.cuts(tree.here)
