"""A tree gone through by descriptors: as deep and as wide as users made it.

No recursion, no path, and few descriptors and little memory however deep and wide it is: those of
the directories above are closed when there are too many, and opened again by `..` on the way back,
which is believed only if it is the directory that it was. Names that wait take their bytes and no
more. Nothing here follows a symlink or enters another mount. Synchronous.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from aufsd.kernel.beneath import DIRECTORY, open_beneath

# directories that one descent has open at a time, if it is not told otherwise
OPEN_AT_MOST: Final = 16
# of a path in a message: a few thousand levels say nothing more
_SHOWN: Final = 1000
# a directory that is gone by now, is another thing, or that something is mounted on
NOT_ENTERED: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV)


@dataclass(slots=True)
class Names:
    """Names in the order that they came: a million take little more than their bytes.

    To iterate takes them out; more may be added meanwhile.
    """

    _kept: bytearray = field(default_factory=bytearray)
    _at: int = 0

    def add(self, name: bytes) -> None:
        """One more, without a NUL."""
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
    """A name in a tree, and the directory it is in: no path is kept, so depth costs nothing.

    The top has no name, and none above it. `size` is how long the path is, the top's is 0.
    """

    __slots__ = ("above", "name", "size")

    def __init__(self, above: "Way | None", name: bytes) -> None:
        self.above = above
        self.name = name
        self.size: int = above.size + len(name) + bool(above.size) if above else 0

    def names(self) -> list[bytes]:
        """The names that lead to it from the top."""
        found = []
        here = self
        while here.above is not None:
            found.append(here.name)
            here = here.above
        found.reverse()
        return found

    def path(self) -> bytes:
        """The names with a slash between each two; empty for the top."""
        return b"/".join(self.names())


def way_of(path: bytes) -> Way:
    """The way to a path of names and slashes, from a top of its own."""
    here = Way(None, b"")
    for name in path.split(b"/"):
        here = Way(here, name)
    return here


def between(start: Way, target: Way) -> tuple[int, list[bytes]]:
    """How many steps up, and then which names down, lead from one to the other.

    Two tops count as the same one.
    """
    ups = 0
    downs: list[bytes] = []
    one, other = start, target
    # up from both to the nearest that both lie in: a path is longer the deeper it leads
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
    """A directory on the way down. `fd` is -1 while it is not open; then `was` tells it again."""

    way: Way
    fd: int
    was: tuple[int, int] = (0, 0)
    names: Names = field(default_factory=Names)
    # what its user has to remember of it
    marked: bool = False


class Descent:
    """A place in a tree, at first its top; names that wait in each directory above it.

    Owns its descriptors, `close` or a `with` block ends them; `top` stays the caller's.
    """

    def __init__(self, top: int, keep: int = OPEN_AT_MOST) -> None:
        """`keep`: how many directories below the top may be open at a time, at least one."""
        self._keep = keep
        self._levels = [_Level(Way(None, b""), os.open(b".", DIRECTORY, dir_fd=top))]
        # the highest level below the top that may be open: those between it and the top are not
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
        """The directory where we stand; closed when we go on."""
        return self._levels[-1].fd

    @property
    def depth(self) -> int:
        """How many levels below the top we stand."""
        return len(self._levels) - 1

    @property
    def name(self) -> bytes:
        """The name of the directory where we stand, in the one above; empty for the top."""
        return self._levels[-1].way.name

    @property
    def way(self) -> Way:
        """The directory where we stand."""
        return self._levels[-1].way

    @property
    def marked(self) -> bool:
        """What `mark` was called for in this directory."""
        return self._levels[-1].marked

    def mark(self) -> None:
        """Remember something of the directory where we stand."""
        self._levels[-1].marked = True

    def path(self, name: bytes = b"") -> str:
        """Where we stand, or a name in it, from the top on; for messages, cut if it is long."""
        names = [level.way.name for level in self._levels[1 : _SHOWN + 1]]
        if self.depth > _SHOWN:
            names.append(b"...")
        return "/" + os.fsdecode(b"/".join([*names, name] if name else names))

    def later(self, name: str | bytes) -> None:
        """Keep a name of this directory for `take`."""
        self._levels[-1].names.add(os.fsencode(name))

    def take(self) -> bytes | None:
        """The name of this directory that waits longest; None if none does."""
        return next(self._levels[-1].names, None)

    def down(self, name: bytes) -> None:
        """Go into a directory of the one where we stand.

        Raises OSError, and then we stand where we did: EXDEV if something is mounted on it, ELOOP
        or ENOTDIR if it is no directory.
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

        If somebody moved directories meanwhile: to the nearest above that is still in its place.
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
        """Go down once more from the top, as far as all is in its place; stand there."""
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
    """The directory `top`, then every one that was said to come `later`, parents first.

    What cannot be entered is passed over: it went meanwhile, or something is mounted on it. Names
    may come and go in a directory that was handed out.
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
    """Open a level again through the one below; False if that does not lead to it any more."""
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
