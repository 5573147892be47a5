"""The members of a tar, one after another: PAX, GNU's long names and sparse files put together.

Pure but for the Source it reads from. It judges the format only; what a name or a type may do to a
layer is `unpack`'s.
"""

from collections.abc import Iterator
from typing import Final

from aufsd.archive import headers
from aufsd.archive.headers import BLOCK, HeaderError, Member
from aufsd.archive.meter import Meter, shown
from aufsd.archive.source import Source
from aufsd_client.errors import BadArchive

# as much as Go's archive/tar takes (maxSpecialFileSize)
_SPECIAL_MAX: Final = 1 << 20
# nanoseconds: seconds have to fit into time_t
_TIME_MAX: Final = (1 << 62) * 1_000_000_000
# -1 stands for "leave it" in chown(2)
_ID_MAX: Final = (1 << 32) - 2
# types whose size field says nothing about data that follows
_HEADER_ONLY: Final = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
# headers that say more about the one that follows; Solaris wrote X for x
_PREFACES: Final = frozenset((headers.PAX, b"X", headers.PAX_GLOBAL, b"L", b"K"))


class Reader:
    """Members of the tar in `source`. The body of one has to be read before the next is asked for;
    what is left of it is skipped."""

    def __init__(self, source: Source, meter: Meter) -> None:
        self._source = source
        self._meter = meter
        # the whole body if it lies in the window, without its consumption: `skip` does that
        self.small_body = source.peek
        # of the current body: bytes not read yet, and padding behind them
        self._left = 0
        self._padding = 0
        # the header that was read last
        self._block = b""
        # records of the current member that make it a sparse file
        self._sparse: dict[bytes, bytes] = {}

    def members(self) -> Iterator[Member]:
        """Every member, up to the end marker; then the stream is drained.

        Raises BadArchive with `entry` and `offset`.
        """
        source = self._source
        while True:
            if self._left or self._padding:
                self.skip()
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

    def skip(self) -> None:
        """Pass over what is left of the body."""
        self._source.skip(self._left + self._padding)
        self._left = self._padding = 0

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
            if member.size < 0:
                raise self._bad("a header has a negative size", start, member.name)
            if kind == headers.PAX_GLOBAL:
                # for all that follows, which Docker ignores too (moby ba7906aef3)
                self._source.skip(member.size + -member.size % BLOCK)
            elif kind == headers.GNU_LONG_NAME:
                long_name = self._special(member, start).partition(b"\0")[0]
            elif kind == headers.GNU_LONG_LINK:
                long_link = self._special(member, start).partition(b"\0")[0]
            else:
                records = self._records(member, start)
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
        if header.size > _SPECIAL_MAX:
            raise self._bad(f"a header of {header.size} bytes", start, header.name)
        body = self._source.take(header.size)
        self._source.skip(-header.size % BLOCK)
        return body

    def _records(self, header: Member, start: int) -> list[tuple[bytes, bytes]]:
        try:
            return headers.parse_pax(self._special(header, start))
        except HeaderError as error:
            raise self._bad(str(error), start, header.name) from None

    def _apply(self, member: Member, records: list[tuple[bytes, bytes]]) -> None:
        """Take over PAX records."""
        sparse: dict[bytes, bytes] = {}
        pairs: list[bytes] = []
        for key, value in records:
            if key == b"path":
                member.name = value or member.name
            elif key == b"linkpath":
                member.link = value or member.link
            elif key == b"mtime":
                member.mtime = self._time(value, member)
            elif key == b"size":
                member.size = self._whole(value, member)
            elif key == b"uid":
                member.uid = self._whole(value, member)
            elif key == b"gid":
                member.gid = self._whole(value, member)
            elif key.startswith(headers.XATTR_RECORD):
                name = key[len(headers.XATTR_RECORD) :]
                name = name.replace(b"%3D", b"=").replace(b"%25", b"%")
                member.xattrs = [*(member.xattrs or ()), (name, value)]
            elif key == b"GNU.sparse.name":
                sparse[key] = value
            elif key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                pairs.append(value)
            elif key.startswith(b"GNU.sparse."):
                sparse[key] = value
        if pairs:
            sparse[b"GNU.sparse.map"] = b",".join(pairs)
        if b"GNU.sparse.name" in sparse:
            member.name = sparse[b"GNU.sparse.name"]
        if b"\0" in member.name or b"\0" in member.link:
            raise self._bad("a name with a NUL in it", member.start)
        self._sparse = sparse

    def _open_body(self, member: Member) -> None:
        """Judge the header as a whole, and stand before the body."""
        kind = member.kind
        sparse = self._sparse
        if sparse:
            self._sparse = {}
        if not 0 <= member.uid <= _ID_MAX or not 0 <= member.gid <= _ID_MAX:
            raise self._bad("an owner out of range", member.start, member.name)
        if not -_TIME_MAX < member.mtime < _TIME_MAX:
            raise self._bad("a time out of range", member.start, member.name)
        if kind in _HEADER_ONLY:
            member.size = 0
            return
        stored = member.size
        if stored < 0:
            raise self._bad("a header has a negative size", member.start, member.name)
        self._left = stored
        self._padding = -stored % BLOCK
        if kind == headers.REGULAR:
            if member.name.endswith(b"/"):
                member.kind = headers.DIRECTORY
        elif kind == headers.GNU_SPARSE:
            self._old_sparse(member)
        if b"GNU.sparse.major" in sparse or b"GNU.sparse.map" in sparse:
            self._pax_sparse(member, sparse)
        if member.extents is not None:
            self._check_extents(member, self._left)
            member.kind = headers.REGULAR

    # --- sparse files (GNU tar's manual, "Storing Sparse Files") -------------------------------

    def _old_sparse(self, member: Member) -> None:
        """Four extents and the size stand in the header itself, more in blocks behind it."""
        block = self._block
        extents: list[tuple[int, int]] = []
        numbers, more, real = block[386:482], block[482], block[483:495]
        try:
            member.size = headers.number(real, "real size")
            while True:
                for at in range(0, len(numbers) - 23, 24):
                    if numbers[at] == 0:
                        break
                    extents.append(
                        (
                            headers.number(numbers[at : at + 12], "extent"),
                            headers.number(numbers[at + 12 : at + 24], "extent"),
                        )
                    )
                if not more:
                    break
                following = self._source.take(BLOCK)
                numbers, more = following[:504], following[504]
        except HeaderError as error:
            raise self._bad(str(error), member.start, member.name) from None
        member.extents = extents

    def _pax_sparse(self, member: Member, sparse: dict[bytes, bytes]) -> None:
        size = sparse.get(b"GNU.sparse.realsize", sparse.get(b"GNU.sparse.size"))
        if size is None:
            raise self._bad("a sparse file without a size", member.start, member.name)
        if sparse.get(b"GNU.sparse.major") == b"1":
            numbers = self._sparse_map(member)
        else:
            listed = sparse.get(b"GNU.sparse.map", b"")
            numbers = [self._whole(n, member) for n in listed.split(b",")] if listed else []
        if len(numbers) % 2:
            raise self._bad("a sparse map that is cut short", member.start, member.name)
        member.size = self._whole(size, member)
        member.extents = list(zip(numbers[::2], numbers[1::2], strict=True))

    def _sparse_map(self, member: Member) -> list[int]:
        """Format 1.0: decimal lines at the start of the body, their number first."""
        text = b""
        wanted = 1
        while text.count(b"\n") < wanted:
            if self._left < BLOCK or len(text) > _SPECIAL_MAX:
                raise self._bad("a sparse map that is cut short", member.start, member.name)
            text += self._source.take(BLOCK)
            self._left -= BLOCK
            if wanted == 1 and b"\n" in text:
                wanted = 1 + 2 * self._whole(text.split(b"\n", 1)[0], member)
        return [self._whole(line, member) for line in text.split(b"\n")[1:wanted]]

    def _check_extents(self, member: Member, stored: int) -> None:
        assert member.extents is not None
        at = total = 0
        for offset, length in member.extents:
            if offset < at or offset + length > member.size:
                raise self._bad("a sparse map out of order", member.start, member.name)
            at = offset + length
            total += length
        if total != stored:
            raise self._bad("a sparse map that does not fit", member.start, member.name)

    # --- numbers in PAX records ----------------------------------------------------------------

    def _whole(self, value: bytes, member: Member) -> int:
        if not value.isdigit() or len(value) > 19:
            raise self._bad("a PAX number out of range", member.start, member.name)
        return int(value)

    def _time(self, value: bytes, member: Member) -> int:
        """Decimal seconds, as nanoseconds, rounded down."""
        whole, _, fraction = value.partition(b".")
        digits = whole.removeprefix(b"-")
        if not digits.isdigit() or len(digits) > 19 or (fraction and not fraction.isdigit()):
            raise self._bad("a PAX time out of range", member.start, member.name)
        nanoseconds = int(fraction[:9].ljust(9, b"0"))
        sign = -1 if whole.startswith(b"-") else 1
        return sign * (int(digits) * 1_000_000_000 + nanoseconds)

    def _bad(self, what: str, start: int, name: bytes = b"") -> BadArchive:
        if name:
            return BadArchive(f"{what}: {shown(name)}", entry=shown(name), offset=start)
        return BadArchive(f"{what} (at byte {start})", offset=start)
