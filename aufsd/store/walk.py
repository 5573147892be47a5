"""Walks a tree by descriptors, however deep and wide it is.

It needs few descriptors and little memory, and uses neither recursion nor paths. When too many
directories are open, the upper ones are closed. On the way back they are opened again as `..`, and
used only if that is the same directory as before. A name that waits takes only its own bytes. No
symlink is followed, and no other mount is entered. Synchronous.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from aufsd.kernel.beneath import DIRECTORY, open_beneath

# directories that one descent has open at a time, by default
OPEN_AT_MOST: Final = 16
# bytes of a path in a message
_SHOWN: Final = 1000
# the directory is gone, is something else, or has a mount on it
NOT_ENTERED: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV)


@dataclass(slots=True)
class Names:
    """A queue of names. A million names take little more than their bytes.

    Iterating takes names out. Others may be added meanwhile.
    """

    _kept: bytearray = field(default_factory=bytearray)
    _at: int = 0

    def add(self, name: bytes) -> None:
        """Add a name, which has no NUL."""
        self._kept += name
        self._kept.append(0)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        end = self._kept.find(0, self._at)
        if end < 0:
            raise StopIteration
        name = bytes(self._kept[self._at : end])
        self._at = end + 1
        return name


class Way:
    """A name in a tree, and the Way of its directory. No path is kept, so depth costs nothing.

    The top has no name, and no directory above. `size` is the length of the path, 0 for the top.
    """

    __slots__ = ("above", "name", "size")

    def __init__(self, above: "Way | None", name: bytes) -> None:
        self.above = above
        self.name = name
        self.size: int = above.size + len(name) + bool(above.size) if above else 0

    def names(self) -> list[bytes]:
        """The names from the top to here."""
        found = []
        here = self
        while here.above is not None:
            found.append(here.name)
            here = here.above
        found.reverse()
        return found

    def path(self) -> bytes:
        """The path from the top; empty for the top itself."""
        return b"/".join(self.names())


def way_of(path: bytes) -> Way:
    """The Way of a path, below a new top."""
    here = Way(None, b"")
    for name in path.split(b"/"):
        here = Way(here, name)
    return here


def between(start: Way, target: Way) -> tuple[int, list[bytes]]:
    """The number of steps up, and then the names down, that lead from one Way to another.

    All tops count as the same.
    """
    ups = 0
    downs: list[bytes] = []
    one, other = start, target
    # go up from both to their nearest common directory; the longer path is the deeper one
    while one is not other and (one.size or other.size):
        size = one.size
        if one.above is not None and size >= other.size:
            one = one.above
            ups += 1
        if other.above is not None and other.size >= size:
            downs.append(other.name)
            other = other.above
    downs.reverse()
    return ups, downs


@dataclass(slots=True)
class _Level:
    """A directory on the way down. `fd` is -1 while it is closed; then `was` identifies it."""

    way: Way
    fd: int
    was: tuple[int, int] = (0, 0)
    names: Names = field(default_factory=Names)
    # for the user of the walk
    marked: bool = False


class Descent:
    """A current directory in a tree, and the names that wait in each directory above it.

    It owns its descriptors until `close`, or the end of a `with` block. The caller owns `top`.
    """

    def __init__(self, top: int, keep: int = OPEN_AT_MOST) -> None:
        """`keep`: how many directories below the top may be open at a time, at least one."""
        self._keep = keep
        self._levels = [_Level(Way(None, b""), os.open(b".", DIRECTORY, dir_fd=top))]
        # levels above this one, except the top, are closed
        self._open = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor."""
        for level in self._levels:
            if level.fd >= 0:
                os.close(level.fd)
        self._levels.clear()

    @property
    def fd(self) -> int:
        """The current directory. The descriptor is closed when the walk goes on."""
        return self._levels[-1].fd

    @property
    def depth(self) -> int:
        """The level of the current directory; 0 for the top."""
        return len(self._levels) - 1

    @property
    def name(self) -> bytes:
        """The name of the current directory; empty for the top."""
        return self._levels[-1].way.name

    @property
    def way(self) -> Way:
        """The current directory."""
        return self._levels[-1].way

    @property
    def marked(self) -> bool:
        """What `mark` has recorded for the current directory."""
        return self._levels[-1].marked

    def mark(self) -> None:
        """Record something for the current directory."""
        self._levels[-1].marked = True

    def path(self, name: bytes = b"") -> str:
        """The path of the current directory, or of a name in it, for messages. May be cut."""
        names = [level.way.name for level in self._levels[1 : _SHOWN + 1]]
        if self.depth > _SHOWN:
            names.append(b"...")
        return "/" + os.fsdecode(b"/".join([*names, name] if name else names))

    def later(self, name: str | bytes) -> None:
        """Keep a name of the current directory for `take`."""
        self._levels[-1].names.add(os.fsencode(name))

    def take(self) -> bytes | None:
        """The next waiting name of the current directory; None if there is none."""
        return next(self._levels[-1].names, None)

    def down(self, name: bytes) -> None:
        """Go into a directory of the current one.

        Raises OSError, and stays in the current one: EXDEV if something is mounted on it, ELOOP or
        ENOTDIR if it is no directory.
        """
        below = open_beneath(self.fd, name)
        self._levels.append(_Level(Way(self.way, name), below))
        if len(self._levels) - self._open > self._keep:
            level = self._levels[self._open]
            level.was = _identity(level.fd)
            os.close(level.fd)
            level.fd = -1
            self._open += 1

    def up(self) -> None:
        """Go back to the directory above.

        If somebody has moved it meanwhile, go to the nearest one above that is still in its place.
        """
        left = self._levels.pop()
        try:
            above = self._levels[-1]
            if above.fd < 0 and not _reopened(above, left.fd):
                self._find_again()
        finally:
            os.close(left.fd)
        self._open = max(1, min(self._open, self.depth))

    def _find_again(self) -> None:
        """Go down again from the top, as far as the directories are in their places."""
        at = self._levels[0].fd
        for depth, level in enumerate(self._levels[1:], 1):
            try:
                fd = open_beneath(at, level.way.name)
            except OSError:
                found = False
            else:
                found = _identity(fd) == level.was
                if found:
                    level.fd = fd
                else:
                    os.close(fd)
            above = self._levels[depth - 1]
            if depth > 1 and found:
                os.close(above.fd)
                above.fd = -1
            if not found:
                del self._levels[depth:]
                return
            at = level.fd


def walk(top: int) -> Iterator[Descent]:
    """Yields `top`, then every directory that was given to `later`, parents first.

    A directory that cannot be entered is skipped: it is gone, or something is mounted on it. The
    caller may make and delete names in a directory that it was given.
    """
    with Descent(top) as here:
        yield here
        while True:
            name = here.take()
            if name is None:
                if not here.depth:
                    return
                here.up()
                continue
            try:
                here.down(name)
            except OSError as error:
                if error.errno not in NOT_ENTERED:
                    raise
                continue
            yield here


def _reopened(above: _Level, below: int) -> bool:
    """Open a level again as `..` of the one below; False if that is another directory now."""
    try:
        fd = os.open(b"..", DIRECTORY, dir_fd=below)
    except OSError:
        return False
    if _identity(fd) == above.was:
        above.fd = fd
        return True
    os.close(fd)
    return False


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
