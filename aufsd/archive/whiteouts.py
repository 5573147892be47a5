"""Which whiteouts a layer keeps: those in a directory that has something below it to hide.

overlayfs merges a directory only where a lower branch has it too, and lists any other one as it
lies on disk (ovl_iterate() in fs/overlayfs/readdir.c): a whiteout in a directory that is opaque, or
that is new in its layer, shows as a name that no call finds, and `ls`, `find` and `tar` fail on it.
There it hides nothing, so it is not kept. The layer's root is always merged.
"""

import os
from collections.abc import Callable, Sequence
from typing import Final

from aufsd.archive.directories import Directory
from aufsd.archive.meter import shown
from aufsd.archive.tree import Tree
from aufsd.store import dialect as marks
from aufsd.store.dialect import Dialect
from aufsd.store.walk import Way, way_of
from aufsd_client.errors import LimitExceeded

# bytes of whiteouts whose directory is not there yet
_WAITING_MAX: Final = 4 << 20
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
        self._rows: list[tuple[bytes, bytes]] = []
        self._held = 0

    def add(self, directory: bytes, name: bytes) -> None:
        """Keep one for later. Raises LimitExceeded."""
        self._rows.append((directory, name))
        self._held += len(directory) + len(name) + 128
        if self._held > _WAITING_MAX:
            raise LimitExceeded(
                "too many whiteouts lie in directories that the archive has not put before them, "
                f"such as {shown(directory)}"
            )

    def left_out(self, made: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether some of them are not among these."""
        return len(made) < len(self._rows)

    def those_to_make(self, tree: Tree, lies_below: Below) -> list[tuple[bytes, bytes]]:
        """Directory and name of those that hide something."""
        opaque = _Opaque(tree)
        found = []
        path = way = None
        for row in self._rows:
            # of those in one directory, one way is asked for
            if way is None or row[0] != path:
                path, way = row[0], way_of(row[0])
            if tree.reach(path) or _shows_below(tree, path, way, lies_below, opaque):
                found.append(row)
        return found


def settle(tree: Tree, lies_below: Below) -> int:
    """Take away the whiteouts of this archive that hide nothing; how many those were."""
    taken = 0
    opaque = _Opaque(tree)
    for directory in list(tree.marked.values()):
        if directory is tree.root or (not opaque.cuts(directory) and lies_below(directory.way)):
            continue
        tree.go(directory)
        before = os.stat(b".").st_mtime_ns
        some = _take_away(tree.dialect)
        if some:
            # it may be one that has got its time already
            os.utime(b".", ns=(before, before))
        taken += some
    return taken


def _take_away(dialect: Dialect) -> int:
    """Remove every whiteout in the current directory; how many there were."""
    with os.scandir(b".") as entries:
        found = [
            entry.name
            for entry in entries
            if (
                marks.deleted_name(entry.name) is not None
                if dialect is Dialect.AUFS
                else not (
                    entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
                )
                and marks.is_whiteout_node(os.lstat(entry.name))
            )
        ]
    for name in found:
        os.unlink(name)
    return len(found)


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
