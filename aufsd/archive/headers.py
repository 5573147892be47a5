"""Reads and writes one tar header (pax(1), and the additions of GNU tar). Pure.

It writes ustar, with a PAX header before it only if ustar cannot hold a value. It reads ustar, GNU,
star's prefix, V7, and base-256 numbers.
"""

import re
import struct
import zlib
from array import array
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

BLOCK: Final = 512
# nanoseconds: seconds have to fit into time_t
TIME_MAX: Final = (1 << 62) * 1_000_000_000
REGULAR: Final = b"0"
LINK: Final = b"1"
SYMLINK: Final = b"2"
CHARACTER: Final = b"3"
BLOCK_DEVICE: Final = b"4"
DIRECTORY: Final = b"5"
FIFO: Final = b"6"
PAX: Final = b"x"
PAX_GLOBAL: Final = b"g"
GNU_LONG_NAME: Final = b"L"
GNU_LONG_LINK: Final = b"K"
GNU_SPARSE: Final = b"S"

XATTR_RECORD: Final = b"SCHILY.xattr."
# the same with names and values encoded; bsdtar writes both
LIBARCHIVE_RECORD: Final = b"LIBARCHIVE.xattr."
# POSIX ACLs as text, which `tar --acls` and bsdtar write in place of their xattrs
ACL_RECORDS: Final = {
    b"SCHILY.acl.access": b"system.posix_acl_access",
    b"SCHILY.acl.default": b"system.posix_acl_default",
}

# what fits into the fields of ustar
_NAME_MAX: Final = 100
_ID_MAX: Final = 0o7777777
_SIZE_MAX: Final = 0o77777777777
# magic, version, empty user and group names
_USTAR: Final = b"ustar\x0000" + bytes(64)
_NO_DEVICE: Final = b"0000000\x000000000\x00" + bytes(155 + 12)
_FIRST: Final = b"%b%07o\0%07o\0%07o\0%011o\0%011o\0"
_SPACES: Final = b"        "


class HeaderError(ValueError):
    """These 512 bytes are no header. The text says why."""


# --- out --------------------------------------------------------------------------------------


def encode(
    name: bytes,
    kind: bytes,
    *,
    mode: int,
    uid: int,
    gid: int,
    size: int = 0,
    mtime: int = 0,
    link: bytes = b"",
    device: tuple[int, int] | None = None,
    xattrs: Iterable[tuple[bytes, bytes]] = (),
) -> bytes:
    """A header of `mtime` whole seconds, and the PAX header it needs before it.

    What is not ASCII stands in a PAX record; what is not UTF-8 either, as it is in the plain header
    if it fits, which GNU tar, bsdtar and tarfile all read without a word. A longer one needs a
    record, which hdrcharset=BINARY announces (pax(1)): bsdtar fails without it, and GNU tar only
    says that it ignores it.
    """
    records: list[tuple[bytes, bytes]] = []
    binary = False
    for key, value in ((b"path", name), (b"linkpath", link)):
        if value.isascii() and len(value) <= _NAME_MAX:
            continue
        text = _is_utf8(value)
        if text or len(value) > _NAME_MAX:
            records.append((key, value))
            binary = binary or not text
    if binary:
        records.insert(0, (b"hdrcharset", b"BINARY"))
    if not 0 <= mtime <= _SIZE_MAX:
        records.append((b"mtime", b"%d" % mtime))
        mtime = 0
    if uid > _ID_MAX:
        records.append((b"uid", b"%d" % uid))
        uid = 0
    if gid > _ID_MAX:
        records.append((b"gid", b"%d" % gid))
        gid = 0
    if size > _SIZE_MAX:
        records.append((b"size", b"%d" % size))
    for key, value in xattrs:
        # a record's key ends at its first "=": GNU tar and bsdtar write it so too
        key = key.replace(b"%", b"%25").replace(b"=", b"%3D")
        records.append((XATTR_RECORD + key, value))
    before = _pax(records) if records else b""
    shown = size if size <= _SIZE_MAX else 0
    return before + _ustar(name, kind, mode, uid, gid, shown, mtime, link, device)


def encode_plain(name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int) -> bytes | None:
    """The header of a regular file that needs nothing more than ustar, as most do; else None."""
    if (
        len(name) > _NAME_MAX
        or not name.isascii()
        or not 0 <= mtime <= _SIZE_MAX
        or size > _SIZE_MAX
        or uid > _ID_MAX
        or gid > _ID_MAX
    ):
        return None
    first = _FIRST % (name.ljust(100, b"\0"), mode & 0o7777, uid, gid, size, mtime)
    return b"%b%06o\0 %b" % (first, (zlib.adler32(first) & 0xFFFF) + _PLAIN_SUM, _PLAIN)


def _ustar(
    name: bytes,
    kind: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    link: bytes = b"",
    device: tuple[int, int] | None = None,
) -> bytes:
    first = _FIRST % (name[:100].ljust(100, b"\0"), mode & 0o7777, uid, gid, size, mtime)
    last = kind + link[:100].ljust(100, b"\0") + _USTAR
    if device is None:
        last += _NO_DEVICE
    else:
        last += _number(device[0]) + _number(device[1]) + bytes(155 + 12)
    # eight spaces stand for the checksum in its own sum
    return b"%b%06o\0 %b" % (first, _sum(first) + _sum(last) + 8 * 0x20, last)


def _sum(data: bytes | memoryview) -> int:
    """The sum of at most 364 bytes, by the one loop over bytes that zlib has.

    adler32 keeps 1 + the sum modulo 65521 in its low half. A ustar header's halves stay below it.
    """
    low = (zlib.adler32(data[:256]) & 0xFFFF) - 1
    rest = data[256:]
    return low + (zlib.adler32(rest) & 0xFFFF) - 1 if rest else low


# what stands behind the checksum of a regular file, and what it and the adler32 add to that
_PLAIN: Final = REGULAR + bytes(100) + _USTAR + _NO_DEVICE
_PLAIN_SUM: Final = sum(_PLAIN) + 8 * 0x20 - 1


def _number(value: int) -> bytes:
    return b"%07o\0" % value if value <= _ID_MAX else b"\x80" + value.to_bytes(7, "big")


def _pax(records: list[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(_record(key, value) for key, value in records)
    # the name that Python's tarfile uses; nothing that unpacks PAX looks at it
    header = _ustar(b"././@PaxHeader", PAX, 0o644, 0, 0, len(body), 0)
    return header + body + bytes(-len(body) % BLOCK)


def _record(key: bytes, value: bytes) -> bytes:
    """One `LENGTH KEY=VALUE` line, whose length counts its own digits."""
    rest = len(key) + len(value) + 3
    size = rest + len(str(rest))
    if rest + len(str(size)) != size:
        size = rest + len(str(size))
    return b"%d %b=%b\n" % (size, key, value)


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


# --- in ---------------------------------------------------------------------------------------

# name; mode, uid and gid; size; mtime; checksum; type; first of the link's name and of the prefix
FIELDS: Final = struct.Struct("100s24s12s12s8scB187xB")
_ZERO: Final = bytes(BLOCK)
_NOBODY: Final = (0, 0, 0)
# GNU tar skips what the previous field ran over and blanks, and ends at the first of either; Go
# cuts both off both ends
_NUMBER: Final = re.compile(rb"[\0\s]*([0-7]*)(?:[\0\s].*)?", re.DOTALL).fullmatch
# LENGTH KEY=VALUE
_RECORDS: Final = re.compile(rb"([0-9]{1,19}) ([^=\n]+)=([^\n]*)\n").findall


class Member:
    """One entry of a tar. `size` is the file's, `mtime` in nanoseconds, `start` its offset.

    `extents` are a sparse file's pieces of data, their offsets and their lengths in the order of
    the stream; `sparse` are the records that say so.
    """

    start = 0
    link = b""
    major = minor = 0
    xattrs: list[tuple[bytes, bytes]] | None = None
    extents: tuple["array[int]", "array[int]"] | None = None
    sparse: dict[bytes, bytes] | None = None

    def __init__(
        self, name: bytes, kind: bytes, owner: tuple[int, int, int], size: int, mtime: int
    ) -> None:
        self.name = name
        self.kind = kind
        self.mode, self.uid, self.gid = owner
        self.size = size
        self.mtime = mtime


def decode(block: bytes) -> Member:
    """What one header says; PAX records and GNU long names are the reader's to add.

    Of a PAX header only its size. Raises HeaderError.
    """
    name, owner, size, mtime, checksum, kind, link, prefix = FIELDS.unpack_from(block)
    if zlib.adler32(block) & 0xFFFF != adler_of(checksum):
        _check_signed(block, checksum)
    if kind == PAX:
        # GNU tar writes one for every file
        return Member(b"", kind, _NOBODY, size_of(size), 0)
    name = name.partition(b"\0")[0]
    # GNU tar has times where POSIX has the prefix, and says so by its magic
    if prefix and block[257:263] == b"ustar\0":
        # star's is shorter, and says so at its end
        before = block[345:476] if block[508:] == b"tar\0" else block[345:500]
        name = before.partition(b"\0")[0] + b"/" + name
    member = Member(
        name,
        REGULAR if kind == b"\0" else kind,
        owner_of(owner),
        size_of(size),
        seconds_of(mtime) * 1_000_000_000,
    )
    if link:
        member.link = block[157:257].partition(b"\0")[0]
    if kind in (CHARACTER, BLOCK_DEVICE):
        member.major = number(block[329:337], "devmajor")
        member.minor = number(block[337:345], "devminor")
    return member


# few of these differ from one entry to the next
@lru_cache(4096)
def owner_of(fields: bytes) -> tuple[int, int, int]:
    mode, uid, gid = fields[:8], fields[8:16], fields[16:]
    return number(mode, "mode") & 0o7777, number(uid, "uid"), number(gid, "gid")


@lru_cache(4096)
def size_of(field: bytes) -> int:
    return number(field, "size")


@lru_cache(4096)
def seconds_of(field: bytes) -> int:
    return number(field, "mtime")


@lru_cache(8192)
def adler_of(checksum: bytes) -> int:
    """The low half of the adler32 of a block with this checksum.

    It is 1 + the sum of the bytes modulo 65521; in the checksum eight blanks stand for itself.
    """
    return (_octal(checksum) + sum(checksum) - 8 * 0x20 + 1) % 65521


def _octal(checksum: bytes) -> int:
    # a block of text has no digits there at all
    if not checksum.strip(b"\0 "):
        raise HeaderError("not a tar header")
    try:
        return number(checksum, "checksum")
    except HeaderError:
        raise HeaderError("not a tar header") from None


def _check_signed(block: bytes, checksum: bytes) -> None:
    """The other sum, which tars of systems with signed chars have. Raises HeaderError."""
    counted = block[:148] + _SPACES + block[156:]
    if _octal(checksum) != sum(counted) - 256 * sum(byte > 127 for byte in counted):
        raise HeaderError("the checksum of a header is wrong")


def number(field: bytes, what: str) -> int:
    """An octal or base-256 field. Raises HeaderError."""
    text = field[:-1]
    if text.isdigit() and field[-1] in b"\0 ":
        try:
            return int(text, 8)
        except ValueError:
            raise HeaderError(f"the {what} of a header is not octal") from None
    if field[0] & 0x80:
        # GNU: the rest is a big-endian number, negative if its own top bit is set
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    found = _NUMBER(field)
    if found is None:
        raise HeaderError(f"the {what} of a header is not a number")
    return int(found[1] or b"0", 8)


def is_zero(block: bytes) -> bool:
    """Whether this is a block of the end marker."""
    return block == _ZERO


def parse_pax(body: bytes) -> list[tuple[bytes, bytes]]:
    """The records of a PAX header, in order; a key may come twice. Raises HeaderError."""
    # one search finds what most headers hold: records without a newline. They are what the lengths
    # say if each is as long as it says, and all together are the whole
    found = _RECORDS(body)
    whole = 0
    for digits, key, value in found:
        size = len(digits) + len(key) + len(value) + 3
        if int(digits) != size:
            return _parse_pax(body)
        whole += size
    if whole != len(body):
        return _parse_pax(body)
    return [(key, value) for _, key, value in found]


def _parse_pax(body: bytes) -> list[tuple[bytes, bytes]]:
    """The same by the lengths."""
    records = []
    at, end = 0, len(body)
    while at < end:
        space = body.find(b" ", at, at + 20)
        try:
            size = int(body[at:space]) if body[at:space].isdigit() else 0
        except ValueError:
            size = 0
        stop = at + size
        equals = body.find(b"=", space, stop)
        if space < 0 or stop > end or equals < 0 or body[stop - 1 : stop] != b"\n":
            raise HeaderError("a PAX record is malformed")
        key, value = body[space + 1 : equals], body[equals + 1 : stop - 1]
        if not key:
            raise HeaderError("a PAX record has no key")
        records.append((key, value))
        at = stop
    return records


def nanoseconds(value: bytes) -> int:
    """The time in a PAX record: decimal seconds, rounded down. Raises HeaderError.

    One of more digits than nineteen comes back as some time that no file system keeps either.
    """
    whole, _, fraction = value.partition(b".")
    if len(fraction) <= 9 and len(whole) <= 19 and whole.isdigit() and fraction.isdigit():
        return int(whole + fraction.ljust(9, b"0"))
    digits = whole.removeprefix(b"-")
    if not digits.isdigit() or (fraction and not fraction.isdigit()):
        raise HeaderError("a PAX time that is no number")
    rest = int(fraction[:9].ljust(9, b"0"))
    sign = -1 if whole.startswith(b"-") else 1
    return sign * (int(digits.lstrip(b"0")[:20] or b"0") * 1_000_000_000 + rest)
