"""Reads the members of a tar, with PAX headers, GNU's long names and sparse files.

Pure, except for the Source that it reads from. It checks only the format; `unpack` checks what a
name or a type may do to a layer.
"""

import re
from array import array
from collections.abc import Iterator
from typing import Final, TypeAlias
from urllib.parse import unquote_to_bytes
from zlib import adler32

from aufsd.archive import headers
from aufsd.archive.headers import BLOCK, HeaderError, Member
from aufsd.archive.meter import Meter, shown
from aufsd.archive.source import Source
from aufsd_client.errors import BadArchive

# as much as Go's archive/tar takes (maxSpecialFileSize)
_SPECIAL_MAX: Final = 1 << 20
_TIME_MAX: Final = headers.TIME_MAX
_TIME_MIN: Final = -_TIME_MAX
# bytes: off_t
_SIZE_MAX: Final = (1 << 63) - 1
# a map of more pieces than this takes tens of megabytes before the first byte of the file
_EXTENTS_MAX: Final = 1 << 20
# records that say nothing if they have no value: then the header's own field counts (pax(1))
_COUNTS: Final = frozenset((b"mtime", b"size", b"uid", b"gid", b"path", b"linkpath"))
# -1 stands for "leave it" in chown(2)
_ID_MAX: Final = (1 << 32) - 2
# types whose size field says nothing about data that follows
_HEADER_ONLY: Final = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
# with the mtime all that most PAX headers of GNU tar's say
_UNUSED: Final = frozenset((b"atime", b"ctime"))
# what GNU tar writes for every file with a fraction in its time; each length is two digits long
_THREE_TIMES: Final = re.compile(
    rb"([0-9]{2}) mtime=([0-9]{1,11})\.([0-9]{1,9})\n"
    rb"([0-9]{2}) atime=([0-9.]{1,21})\n([0-9]{2}) ctime=([0-9.]{1,21})\n"
).fullmatch
# one extent of a sparse file, each in a record of its own
_SPARSE_PAIR: Final = frozenset((b"GNU.sparse.offset", b"GNU.sparse.numbytes"))
# headers that say more about the one that follows; Solaris wrote X for x
_PREFACES: Final = frozenset((headers.PAX, b"X", headers.PAX_GLOBAL, b"L", b"K"))


# name, (mode, uid, gid), time in nanoseconds, content
Plain: TypeAlias = tuple[bytes, tuple[int, int, int], int, memoryview]
# GNU tar writes the other times of a file whose own time has no fraction
_NO_TIME: Final = -1
_fields: Final = headers.FIELDS.unpack_from
_owner, _size, _seconds = headers.owner_of, headers.size_of, headers.seconds_of
_adler: Final = headers.adler_of


class Reader:
    """Members of the tar in `source`. The body of one has to be read before the next is asked for;
    what is left of it is skipped."""

    def __init__(self, source: Source, meter: Meter) -> None:
        self._source = source
        self._meter = meter
        # the whole body if it lies in the window, without its consumption
        self.small_body = source.peek
        # of the current body: bytes not read yet, padding behind them included
        self._left = 0
        # the header that was read last
        self._block = b""

    def members(self) -> Iterator[Member]:
        """Every member, up to the end marker; then the stream is drained.

        Raises BadArchive with `entry` and `offset`.
        """
        source = self._source
        while True:
            if self._left:
                source.skip(self._left)
                self._left = 0
            start = source.offset
            member = self._header(start)
            if member is not None and member.kind in _PREFACES:
                member = self._prefaced(member, start)
            if member is None:
                return
            member.start = start
            self._open_body(member)
            self._meter.entries += 1
            yield member

    def plain(self, prefix: bytes) -> Iterator[Plain]:
        """The files `prefix`NAME that come next, as long as they are plain and in the window whole.

        What `members` would give of them in fewer steps, of which 50,000 files take as many. One is
        consumed when the next is asked for; who stops before that finds it among the members. So
        whatever is unusual only has to end this, and is judged there.
        """
        source = self._source
        source.skip(self._left)
        self._left = 0
        memory, view, start, end = source.window()
        while start + BLOCK <= end:
            at = start
            try:
                block = memory[at : at + BLOCK]
                name, owner, size, mtime, checksum, kind, link, more = _fields(block)
                time = None
                if kind == headers.PAX and adler32(block) & 0xFFFF == _adler(checksum):
                    length = _size(size)
                    at += BLOCK + length + -length % BLOCK
                    if not 0 <= length <= _SPECIAL_MAX or at + BLOCK > end:
                        return
                    time = _only_time(memory[start + BLOCK : start + BLOCK + length])
                    if time is None:
                        return
                    if time == _NO_TIME:
                        time = None
                    block = memory[at : at + BLOCK]
                    name, owner, size, mtime, checksum, kind, link, more = _fields(block)
                if kind != headers.REGULAR or link or more or not name.startswith(prefix):
                    return
                if adler32(block) & 0xFFFF != _adler(checksum):
                    return
                if time is None:
                    time = _seconds(mtime) * 1_000_000_000
                whose, length = _owner(owner), _size(size)
            except HeaderError:
                return
            name = name.partition(b"\0")[0][len(prefix) :]
            at += BLOCK
            stop = at + length + -length % BLOCK
            # one without a name is a directory
            if not name or name.find(b"/") >= 0 or not 0 <= time < _TIME_MAX:
                return
            if length < 0 or stop > end:
                return
            yield name, whose, time, view[at : at + length]
            source.skip(stop - start)
            self._meter.entries += 1
            start = stop

    def copy(self, target: int, count: int) -> None:
        """Copy the next `count` bytes of the body into a file."""
        self._source.copy(target, count)
        self._left -= count

    # --- one member ---------------------------------------------------------------------------

    def _prefaced(self, member: Member | None, start: int) -> Member | None:
        """The member that follows headers which say more about it, of which this is the first."""
        records: list[tuple[bytes, bytes]] = []
        long_name = long_link = b""
        while member is not None and (kind := member.kind) in _PREFACES:
            if kind in (headers.PAX, b"X"):
                records = self._records(member, start)
            elif kind == headers.GNU_LONG_NAME:
                long_name = self._special(member, start).partition(b"\0")[0]
            elif kind == headers.GNU_LONG_LINK:
                long_link = self._special(member, start).partition(b"\0")[0]
            else:
                # for all that follows, which Docker ignores too (moby ba7906aef3)
                if member.size < 0:
                    raise self._bad("a header has a negative size", start)
                self._source.skip(member.size + -member.size % BLOCK)
            member = self._header(start, continued=bool(records or long_name or long_link))
        if member is None:
            return None
        member.start = start
        member.name = long_name or member.name
        member.link = long_link or member.link
        if records:
            self._apply(member, records)
        return member

    def _header(self, start: int, *, continued: bool = False) -> Member | None:
        block = self._block = self._source.block()
        if len(block) < BLOCK:
            if block or continued:
                raise self._source.cut_short()
            what = "is empty" if not start else "ends without the end marker"
            raise BadArchive(f"the stream {what}", offset=start)
        try:
            return headers.decode(block)
        except HeaderError as error:
            if not headers.is_zero(block):
                raise self._bad(str(error), start) from None
        if continued:
            raise self._bad("the archive ends inside an entry", start)
        self._end(start)
        return None

    def _end(self, start: int) -> None:
        """Behind the first zero block: nothing but zeros, and another block of them."""
        if not self._source.drain():
            raise BadArchive("something else follows the end of the archive", offset=start)
        if self._source.offset - start < 2 * BLOCK:
            self._meter.warn("the archive ends with one zero block instead of two")

    def _special(self, header: Member, start: int) -> bytes:
        size = header.size
        if not 0 <= size <= _SPECIAL_MAX:
            raise self._bad(f"a header of {size} bytes", start, header.name)
        return self._source.take(size + -size % BLOCK)[:size]

    def _records(self, header: Member, start: int) -> list[tuple[bytes, bytes]]:
        try:
            return headers.parse_pax(self._special(header, start))
        except HeaderError as error:
            raise self._bad(str(error), start, header.name) from None

    def _apply(self, member: Member, records: list[tuple[bytes, bytes]]) -> None:
        """Take over PAX records."""
        sparse: list[tuple[bytes, bytes]] = []
        xattrs: list[tuple[bytes, bytes]] = []
        encoded: list[bytes] = []
        for key, value in records:
            if not value and key in _COUNTS:
                continue
            if key == b"mtime":
                member.mtime = self._time(value, member)
            elif key in _UNUSED:
                continue
            elif key == b"path":
                member.name = self._name(value, member)
            elif key == b"linkpath":
                member.link = self._name(value, member)
            elif key == b"size":
                member.size = self._whole(value, member)
            elif key == b"uid":
                member.uid = self._whole(value, member)
            elif key == b"gid":
                member.gid = self._whole(value, member)
            elif key.startswith(headers.XATTR_RECORD):
                name = key[len(headers.XATTR_RECORD) :]
                xattrs.append((name.replace(b"%3D", b"=").replace(b"%25", b"%"), value))
            elif key in headers.ACL_RECORDS:
                xattrs.append((key, value))
            elif key.startswith(headers.LIBARCHIVE_RECORD):
                encoded.append(unquote_to_bytes(key[len(headers.LIBARCHIVE_RECORD) :]))
            elif key.startswith(b"GNU.sparse."):
                sparse.append((key, value))
        if xattrs:
            member.xattrs = xattrs
        if encoded:
            self._tell_encoded(member, encoded, {name for name, _ in xattrs})
        if sparse:
            member.sparse = dict(sparse)
            pairs = [value for key, value in sparse if key in _SPARSE_PAIR]
            if pairs:
                member.sparse[b"GNU.sparse.map"] = b",".join(pairs)
            if b"GNU.sparse.name" in member.sparse:
                member.name = self._name(member.sparse[b"GNU.sparse.name"], member)

    def _tell_encoded(self, member: Member, encoded: list[bytes], known: set[bytes]) -> None:
        """Warn of xattrs that stand in libarchive's own records alone, which nothing else reads."""
        for name in encoded:
            if name not in known:
                self._meter.warn(
                    f"dropped the attribute {shown(name)} of {shown(member.name)}: it stands in a "
                    "LIBARCHIVE.xattr record alone; bsdtar --format=pax writes both forms"
                )

    def _open_body(self, member: Member) -> None:
        """Judge the header as a whole, and stand before the body."""
        kind = member.kind
        if not 0 <= member.uid <= _ID_MAX or not 0 <= member.gid <= _ID_MAX:
            raise self._bad("an owner out of range", member.start, member.name)
        if not _TIME_MIN < member.mtime < _TIME_MAX:
            # a time is no reason to refuse a layer
            member.mtime = max(_TIME_MIN + 1, min(member.mtime, _TIME_MAX - 1))
        if kind in _HEADER_ONLY:
            member.size = 0
            return
        stored = member.size
        if not 0 <= stored <= _SIZE_MAX:
            raise self._bad("a size out of range", member.start, member.name)
        self._left = stored + -stored % BLOCK
        if kind == headers.REGULAR:
            if member.name.endswith(b"/"):
                member.kind = headers.DIRECTORY
        elif kind == headers.GNU_SPARSE:
            self._old_sparse(member)
        sparse = member.sparse
        if sparse and (b"GNU.sparse.major" in sparse or b"GNU.sparse.map" in sparse):
            stored -= self._pax_sparse(member, sparse)
        if member.extents is not None:
            self._check_extents(member, stored)
            member.kind = headers.REGULAR

    # --- sparse files (GNU tar's manual, "Storing Sparse Files") ------------------------------

    def _old_sparse(self, member: Member) -> None:
        """Four extents and the size stand in the header itself, more in blocks behind it."""
        block = self._block
        offsets, lengths = array("q"), array("q")
        numbers, more, real = block[386:482], block[482], block[483:495]
        try:
            member.size = headers.number(real, "real size")
            if not 0 <= member.size <= _SIZE_MAX:
                raise self._bad("a size out of range", member.start, member.name)
            while True:
                for at in range(0, len(numbers) - 23, 24):
                    if numbers[at] == 0:
                        break
                    offset = headers.number(numbers[at : at + 12], "extent")
                    length = headers.number(numbers[at + 12 : at + 24], "extent")
                    if not 0 <= offset <= member.size or not 0 <= length <= member.size - offset:
                        raise self._bad("a sparse map out of order", member.start, member.name)
                    # one of nothing marks the end, and may come as often as a compressor likes
                    if length:
                        offsets.append(offset)
                        lengths.append(length)
                if len(offsets) > _EXTENTS_MAX:
                    raise self._too_many(member)
                if not more:
                    break
                following = self._source.take(BLOCK)
                numbers, more = following[:504], following[504]
        except HeaderError as error:
            raise self._bad(str(error), member.start, member.name) from None
        member.extents = offsets, lengths

    def _pax_sparse(self, member: Member, sparse: dict[bytes, bytes]) -> int:
        """Take over what the records say, and the map; how much of the body that took."""
        size = sparse.get(b"GNU.sparse.realsize", sparse.get(b"GNU.sparse.size"))
        if size is None:
            raise self._bad("a sparse file without a size", member.start, member.name)
        if sparse.get(b"GNU.sparse.major") == b"1":
            numbers, taken = self._sparse_map(member)
        else:
            listed = sparse.get(b"GNU.sparse.map", b"")
            pieces = listed.split(b",") if listed else []
            numbers = array("q", (self._whole(n, member) for n in pieces))
            taken = 0
        if len(numbers) % 2:
            raise self._bad("a sparse map that is cut short", member.start, member.name)
        member.size = self._whole(size, member)
        member.extents = numbers[::2], numbers[1::2]
        return taken

    def _sparse_map(self, member: Member) -> tuple["array[int]", int]:
        """Format 1.0: decimal lines at the start of the body, their number first."""
        numbers = array("q")
        wanted, taken, rest = -1, 0, b""
        while wanted < 0 or len(numbers) < wanted:
            # as in Go's archive/tar since 1.25.2, no map is longer than a special header may be
            if self._left < BLOCK or taken >= _SPECIAL_MAX:
                raise self._bad("a sparse map that is cut short", member.start, member.name)
            *lines, rest = (rest + self._source.take(BLOCK)).split(b"\n")
            self._left -= BLOCK
            taken += BLOCK
            if wanted < 0 and lines:
                wanted = 2 * self._whole(lines.pop(0), member)
            for line in lines[: wanted - len(numbers)]:
                numbers.append(self._whole(line, member))
        return numbers, taken

    def _check_extents(self, member: Member, stored: int) -> None:
        assert member.extents is not None
        at = total = 0
        for offset, length in zip(*member.extents, strict=True):
            if offset < at or offset + length > member.size:
                raise self._bad("a sparse map out of order", member.start, member.name)
            at = offset + length
            total += length
        if total != stored:
            raise self._bad("a sparse map that does not fit", member.start, member.name)

    def _too_many(self, member: Member) -> BadArchive:
        what = f"a sparse file in more than {_EXTENTS_MAX} pieces"
        return self._bad(what, member.start, member.name)

    # --- values of PAX records ----------------------------------------------------------------

    def _name(self, value: bytes, member: Member) -> bytes:
        if value.find(b"\0") >= 0:
            raise self._bad("a name with a NUL in it", member.start)
        return value

    def _whole(self, value: bytes, member: Member) -> int:
        if value.isdigit() and len(value) <= 19 and (number := int(value)) <= _SIZE_MAX:
            return number
        raise self._bad("a PAX number out of range", member.start, member.name)

    def _time(self, value: bytes, member: Member) -> int:
        try:
            return headers.nanoseconds(value)
        except HeaderError as error:
            raise self._bad(str(error), member.start, member.name) from None

    def _bad(self, what: str, start: int, name: bytes = b"") -> BadArchive:
        if name:
            return BadArchive(f"{what}: {shown(name)}", entry=shown(name), offset=start)
        return BadArchive(f"{what} (at byte {start})", offset=start)


def _only_time(records: bytes) -> int | None:
    """The mtime in the records of a PAX header, _NO_TIME without one; None if they say anything of
    importance besides, or a time before 1970. Raises HeaderError.
    """
    if found := _THREE_TIMES(records):
        a, whole, fraction, b, atime, c, ctime = found.groups()
        if (
            int(a) == len(whole) + len(fraction) + 11
            and int(b) == len(atime) + 10
            and int(c) == len(ctime) + 10
        ):
            return int(whole + fraction.ljust(9, b"0"))
    time = _NO_TIME
    for key, value in headers.parse_pax(records):
        if key == b"mtime":
            time = headers.nanoseconds(value)
            if time < 0:
                return None
        elif key not in _UNUSED:
            return None
    return time
