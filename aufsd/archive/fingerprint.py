"""Fingerprints of a layer: recorded when its archive is applied, compared by a deep check.

A layer has two fingerprints: of the names and their attributes, and of the content of files. So a
mismatch says which of them has changed. Both are the same in both dialects. They find damage and
not forgery, because whoever can write to a layer can also write its record. So the content of a
file counts by its CRC-32, which takes a twentieth of the time of a SHA-256.
"""

import errno
import hashlib
import os
import stat
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from isal.isal_zlib import crc32 as crc32

from aufsd.archive.attributes import CAPABILITY, may_travel, read_xattr
from aufsd.archive.compact import Ordered
from aufsd.archive.listing import FILE, OPAQUE, SUBDIRECTORY, WHITEOUT, Listing, listed
from aufsd.archive.meter import Meter
from aufsd.archive.pack import Links, read_link
from aufsd.archive.requests import Settings
from aufsd.archive.view import Layer
from aufsd.kernel.syscalls import AT_FDCWD
from aufsd.results import Problem
from aufsd.store.walk import Descent, Way

_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# the version of the fingerprints; a record of another version is ignored
_VERSION: Final = "1"
# bytes; of a larger file those blocks count that hold more than zeros: holes cost nothing
_BLOCK: Final = 64 << 10
_ZEROS: Final = bytes(_BLOCK)
_WINDOW: Final = 16 * _BLOCK
_SIZE: Final = 16  # bytes of a number
_SECOND: Final = 1_000_000_000
# name, mode, user, group, time, size or device, length of the xattrs that follow
_ROW: Final = b"%b\0%o %d %d %d %d %d\0%b"
# of a file: its name, what follows it in its row, the number of what it holds
_KNOWN: Final = b"%b\0%o %d %d %d %d 0\0%d"
# rows that are put together before they are counted in
_ROWS: Final = 1 << 10
_ATTRIBUTES: Final = (CAPABILITY, b"system.posix_acl_access", b"system.posix_acl_default")


# bytes of what is remembered of files, and how many of them may have got another name
_MEMORY: Final = 64 << 20
_LINKED: Final = 1 << 16


class Memory:
    """Files as they were made, so that few of them have to be looked at again.

    Those are left out that have several names, an xattr that counts, or a time that a file system
    might not keep. So are those that are too many. `plain`: nothing but directories was given an
    xattr.
    """

    __slots__ = ("_by_directory", "_room", "linked", "plain")

    def __init__(self) -> None:
        self._by_directory: dict[int, Ordered] = {}
        self._room = _MEMORY
        # inodes that got another name
        self.linked: set[int] = set()
        self.plain = True

    def forget(self) -> None:
        """Something was removed, and inodes may be others'."""
        self._by_directory.clear()

    def link(self, inode: int) -> None:
        """A file got another name."""
        if len(self.linked) < _LINKED:
            self.linked.add(inode)
        else:
            self.forget()
            self._room = 0

    def take(self, directory: int) -> "_Known | None":
        """What is known of a directory, by its inode; it is told once."""
        rows = self._by_directory.pop(directory, None)
        return _Known(iter(rows)) if rows is not None else None

    def note(
        self,
        directory: int,
        name: bytes,
        mode: int,
        owner: tuple[int, int],
        mtime: int,
        body: memoryview,
    ) -> None:
        """Add a file with one name and no xattrs, and a body of at most a block.

        `mtime` is in nanoseconds.
        """
        row = _KNOWN % (name, mode, *owner, mtime // _SECOND, len(body), crc32(body))
        self._room -= len(row)
        if self._room > 0:
            rows = self._by_directory.get(directory)
            if rows is None:
                rows = self._by_directory[directory] = Ordered()
                # what one takes by itself
                self._room -= 400
            rows.add(row)


def of_file(fd: int, size: int) -> int:
    """The number of a file, by its descriptor, whose position moves. Raises OSError."""
    if size <= _BLOCK:
        return crc32(os.pread(fd, _BLOCK, 0))
    sparse = os.fstat(fd).st_blocks * 512 < size
    window = memoryview(bytearray(_BLOCK if sparse else _WINDOW))
    number = at = 0
    while at < size:
        if sparse:
            at = _data(fd, at, size)
        got = os.preadv(fd, (window,), at)
        if not got:
            break
        number = _blocks(window[:got], at // _BLOCK, number)
        at += len(window)
    return number


def _blocks(data: memoryview, index: int, number: int) -> int:
    """Take more blocks of a file into its number; the first of them is its `index`-th."""
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        if block != _ZEROS[: len(block)]:
            number = crc32(index.to_bytes(8, "little"), number)
            number = crc32(block, number)
        index += 1
    return number


def _data(fd: int, at: int, size: int) -> int:
    """The start of the first block that may hold data, from `at`; `size` if only a hole is left."""
    try:
        found = os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size
    return max(at, found - found % _BLOCK)


def fingerprint(
    layer: Layer,
    settings: Settings,
    meter: Meter,
    memory: Memory | None = None,
) -> str:
    """The numbers of the layer that the current directory is the root of, as text.

    The current directory is another one afterwards. What `memory` does not have is read. Raises
    OSError.
    """
    return _Reading(layer, settings, meter, memory).run()


def of_new(layer: Layer, settings: Settings, memory: Memory | None) -> str:
    """What is recorded of a layer that an archive has just been unpacked into, as its root.

    "" for one that was not empty before: then what it held may be damaged already, and would be
    recorded so. "" too for a whole layer (Dialect.NONE). Raises OSError.
    """
    if memory is None or layer.whole:
        return ""
    os.chdir("/")
    return fingerprint(layer, settings, Meter(lambda size, entries: None), memory)


def differences(recorded: str, found: str) -> str:
    """In what a layer is not as recorded, as a phrase; "" if it is, or if nobody can tell."""
    version, *then = recorded.split()
    _, *now = found.split()
    if version != _VERSION or len(then) != len(now):
        return ""
    told = ("names, owners, modes, times or attributes", "contents of files")
    return " and ".join(what for what, a, b in zip(told, then, now, strict=True) if a != b)


def problem(id: str, recorded: str, found: str) -> Problem | None:
    """What `check` says of a layer that is not as recorded; None if it is."""
    told = differences(recorded, found)
    if not told:
        return None
    detail = f"{told} are not as its archive made them; compare with `diff`, or make it anew"
    return Problem(id, "content-differs", detail, False)


class _Known:
    """What is remembered of a directory, asked for in the order of the names."""

    __slots__ = ("_next", "_rows")

    def __init__(self, rows: Iterator[bytes]) -> None:
        self._rows = rows
        self._next = next(rows, b"").split(b"\0")

    def of(self, name: bytes) -> list[bytes] | None:
        """The fields of a file, if they are known."""
        while self._next[0] < name:
            row = next(self._rows, None)
            if row is None:
                # behind every name
                self._next = [b"\xff" * 256]
                return None
            self._next = row.split(b"\0")
        return self._next if self._next[0] == name else None


class _Level(NamedTuple):
    listing: Listing
    known: _Known | None


class _Reading:
    """One walk: names sorted as in the layer's tar, and of each what the tar would say."""

    def __init__(
        self,
        layer: Layer,
        settings: Settings,
        meter: Meter,
        memory: Memory | None,
    ) -> None:
        self._layer = layer
        self._settings = settings
        self._meter = meter
        self._memory = memory or Memory()
        self._plain = memory is not None and memory.plain
        self._names = hashlib.blake2b(digest_size=_SIZE)
        self._contents = hashlib.blake2b(digest_size=_SIZE)
        self._links = Links()

    def run(self) -> str:
        """See `fingerprint`."""
        with Descent(AT_FDCWD) as here:
            levels = [self._enter(here, b".", opaque=False)]
            while True:
                name, listing = self._some(here, levels[-1])
                if name:
                    opaque = listing.beside and self._layer.marks.hides(here.fd, name)
                    here.down(name)
                    levels.append(self._enter(here, name, opaque=opaque))
                    continue
                depth = here.depth
                if not depth:
                    break
                here.up()
                if here.depth < depth - 1:
                    raise OSError(errno.ESTALE, "directories were moved while the layer was read")
                levels.pop()
                os.fchdir(here.fd)
        return f"{_VERSION} {self._names.hexdigest()} {self._contents.hexdigest()}"

    def _some(self, here: Descent, level: "_Level") -> tuple[bytes, Listing]:
        """Go on in a directory, up to the next one in it, whose name this is; empty at the end."""
        listing, known = level.listing, level.known
        rows: list[bytes] = []
        numbers: list[int] = []
        below = b""
        for row in listing.rows:
            name, kind = row[:-2], row[-1]
            if known and kind == FILE:
                # most of a new layer: nothing has to be asked
                fields = known.of(name)
                if fields:
                    rows.append(b"%b\0%b\0" % (name, fields[1]))
                    numbers.append(int(fields[2]))
                    continue
            if kind == SUBDIRECTORY:
                below = name
                break
            if kind in (WHITEOUT, OPAQUE):
                # fields that are empty are nothing else's
                rows.append(b"%b\0\0" % name)
            else:
                rows.append(self._entry(here.way, name, os.lstat(name), numbers))
            if len(rows) >= _ROWS:
                self._add(rows, numbers)
        else:
            rows.append(b"/\0")
        self._add(rows, numbers)
        return below, listing

    def _add(self, rows: list[bytes], numbers: list[int]) -> None:
        self._names.update(b"".join(rows))
        self._contents.update(struct.pack(f"<{len(numbers)}I", *numbers))
        rows.clear()
        numbers.clear()

    def _enter(self, here: Descent, name: bytes, *, opaque: bool) -> "_Level":
        """List the directory where we stand, `name` of the one above, and make it the current."""
        layer, fd = self._layer, here.fd
        found = os.fstat(fd)
        opaque = opaque or (layer.marks.overlay and layer.marks.is_opaque(fd))
        os.fchdir(fd)
        self._names.update(_row(name, found, layer.mtime(fd, found), 0, self._xattrs(b".")))
        self._meter.entries += 1
        linked = self._memory.linked
        listing = listed(self._meter, layer, here.way, opaque=opaque, cut=None, linked=linked)
        return _Level(listing, self._memory.take(found.st_ino))

    def _entry(self, above: Way, name: bytes, found: os.stat_result, numbers: list[int]) -> bytes:
        """What a directory says of an entry that is none; of a file its number too."""
        self._meter.entries += 1
        mode = found.st_mode
        if found.st_nlink > 1:
            first = self._links.first(above, name, found)
            if first:
                return b"%b\0=%b\0" % (name, first)
        size, target = 0, b""
        if stat.S_ISREG(mode):
            size = found.st_size
            numbers.append(self._read(name, size))
        elif stat.S_ISLNK(mode):
            target = read_link(name)
            size = len(target)
        else:
            size = found.st_rdev
        xattrs = b"" if self._plain else self._xattrs(name)
        return _row(name, found, found.st_mtime_ns, size, xattrs) + target

    def _read(self, name: bytes, size: int) -> int:
        fd = os.open(name, _FILE)
        try:
            number = of_file(fd, size)
        finally:
            os.close(fd)
        self._meter.bytes += size
        self._meter.tick()
        return number

    def _xattrs(self, name: bytes) -> bytes:
        """Those that archives may carry, with the lengths of their values."""
        parts = []
        for text in sorted(os.listxattr(name, follow_symlinks=False)):
            raw = text.encode("utf-8", "surrogateescape")
            if raw in _ATTRIBUTES or may_travel(raw, self._settings):
                value = read_xattr(name, text)
                if not value and raw == CAPABILITY:
                    # one that aufs removed by half, which archives do not carry
                    continue
                parts.append(b"%b\0%d\0%b" % (raw, len(value), value))
        return b"".join(parts)


def _row(name: bytes, found: os.stat_result, mtime: int, size: int, xattrs: bytes) -> bytes:
    return _ROW % (
        name,
        found.st_mode,
        found.st_uid,
        found.st_gid,
        # as an archive has it, and some ways to copy a store
        mtime // _SECOND,
        size,
        len(xattrs),
        xattrs,
    )
