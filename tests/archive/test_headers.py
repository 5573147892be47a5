"""Headers against Python's tarfile, which shares no code with ours: each reads the other's."""

import io
import tarfile
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aufsd.archive import headers
from aufsd.archive.headers import BLOCK, HeaderError

# a name as the file system gives it: any bytes but NUL; components do not matter here
NAMES = st.binary(min_size=1, max_size=300).filter(
    lambda name: b"\0" not in name and not name.endswith(b"/")
)
NUMBERS = st.integers(0, (1 << 32) - 2)
KINDS = st.sampled_from([headers.REGULAR, headers.DIRECTORY, headers.SYMLINK, headers.LINK])


def read_back(stream: bytes) -> tarfile.TarInfo:
    with tarfile.open(fileobj=io.BytesIO(stream + bytes(2 * BLOCK)), errors="surrogateescape") as t:
        member = t.next()
        assert member is not None
        return member


def raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


@given(
    NAMES,
    KINDS,
    st.integers(0, 0o7777),
    NUMBERS,
    NUMBERS,
    st.integers(-(1 << 40), 1 << 40),
    NAMES,
)
@example(b"a" * 100, headers.REGULAR, 0o4755, 0, 0, 0, b"b" * 100)
@example(b"a" * 101, headers.LINK, 0o644, 0o7777777, 0o10000000, (1 << 33) - 1, b"b" * 101)
@example(b"\xff\xfe", headers.SYMLINK, 0, 0, 0, 1 << 33, b"\xc3\xa9")
@example(b"new\nline", headers.LINK, 0, 0, 0, -1, b"9 path=x\n")
def test_tarfile_reads_the_same_entry(
    name: bytes, kind: bytes, mode: int, uid: int, gid: int, mtime: int, link: bytes
) -> None:
    has_link = kind in (headers.SYMLINK, headers.LINK)
    stream = headers.encode(
        name, kind, mode=mode, uid=uid, gid=gid, mtime=mtime, link=link if has_link else b""
    )
    assert len(stream) % BLOCK == 0
    found = read_back(stream)
    assert raw(found.name) == name.rstrip(b"/")
    assert found.type == kind
    assert (found.mode, found.uid, found.gid, found.mtime) == (mode, uid, gid, mtime)
    assert raw(found.linkname) == (link if has_link else b"")
    assert (found.uname, found.gname) == ("", "")


@given(st.dictionaries(st.text("abc._", min_size=1, max_size=20), st.binary(max_size=2000)))
@example({"a" * n: b"x" * 70 for n in range(1, 20)})
def test_tarfile_reads_the_same_xattrs(xattrs: dict[str, bytes]) -> None:
    pairs = [(b"user." + key.encode(), value) for key, value in xattrs.items()]
    found = read_back(headers.encode(b"f", headers.REGULAR, mode=0, uid=0, gid=0, xattrs=pairs))
    assert {key: raw(value) for key, value in found.pax_headers.items()} == {
        f"SCHILY.xattr.user.{key}": value for key, value in xattrs.items()
    }


@pytest.mark.parametrize(("major", "minor"), [(8, 1), (1, 3), (4095, 1048575), (1 << 21, 1 << 22)])
def test_tarfile_reads_the_same_device(major: int, minor: int) -> None:
    stream = headers.encode(
        b"d", headers.CHARACTER, mode=0o600, uid=0, gid=0, device=(major, minor)
    )
    found = read_back(stream)
    assert (found.devmajor, found.devminor) == (major, minor)


@pytest.mark.parametrize("size", [0, 1, 0o77777777777, 0o77777777777 + 1, 1 << 50])
def test_tarfile_reads_the_same_size(size: int) -> None:
    assert read_back(headers.encode(b"f", b"0", mode=0, uid=0, gid=0, size=size)).size == size


@given(NAMES, st.integers(0, 0o7777), NUMBERS, NUMBERS, st.integers(0, 1 << 40), NUMBERS)
def test_the_short_way_to_a_header_gives_the_same_bytes(
    name: bytes, mode: int, uid: int, gid: int, mtime: int, size: int
) -> None:
    plain = headers.encode_plain(name, mode, uid, gid, size, mtime)
    whole = headers.encode(
        name, headers.REGULAR, mode=mode, uid=uid, gid=gid, size=size, mtime=mtime
    )
    if name.isascii() and len(whole) == BLOCK:
        assert plain == whole
    else:
        assert plain is None


@given(
    NAMES,
    st.integers(0, 0o7777),
    st.integers(0, 1 << 40),
    st.integers(-(1 << 40), 1 << 40),
    st.integers(0, 1 << 50),
    st.sampled_from((tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)),
)
def test_reads_what_tarfile_writes_in_one_header(
    name: bytes, mode: int, id: int, mtime: int, size: int, how: Literal[0, 1]
) -> None:
    info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
    info.mode, info.uid, info.gid, info.mtime, info.size = mode, id, id, mtime, size
    try:
        stream = info.tobuf(how, "utf-8", "surrogateescape")
    except ValueError:
        return  # this format cannot say it
    found = headers.decode(stream[-BLOCK:])
    assert found.name == name or (len(stream) > BLOCK and name.startswith(found.name))
    assert (found.mode, found.uid, found.gid) == (mode, id, id)
    assert (found.mtime, found.size) == (mtime * 10**9, size)


@given(st.binary(min_size=BLOCK, max_size=BLOCK))
def test_random_blocks_are_no_headers(block: bytes) -> None:
    with pytest.raises(HeaderError):
        headers.decode(block)


@given(st.integers(0, BLOCK - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at: int, change: int) -> None:
    block = bytearray(headers.encode(b"name", headers.REGULAR, mode=0o644, uid=1, gid=2, size=3))
    block[at] ^= change
    if not 148 <= at < 156:
        with pytest.raises(HeaderError):
            headers.decode(bytes(block))


def test_signed_checksums_of_old_tars_are_taken() -> None:
    block = bytearray(headers.encode(b"x", headers.REGULAR, mode=0o644, uid=0, gid=0))
    block[1:4] = b"\xc3\xa9\xff"
    block[148:156] = b" " * 8
    signed = sum(byte - 256 if byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % signed
    assert headers.decode(bytes(block)).name == b"x\xc3\xa9\xff"


def test_gnu_times_are_not_taken_for_a_prefix() -> None:
    block = bytearray(tarfile.TarInfo("name").tobuf(tarfile.GNU_FORMAT))
    block[345:357] = b"14720000000\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    assert headers.decode(bytes(block)).name == b"name"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000644\0", 0o644),
        (b"   644 \0", 0o644),
        (b"00000644", 0o644),
        (b"        ", 0),
        (bytes(8), 0),
        (b"\x80\0\0\0\0\0\x01\0", 256),
        (b"\xff\xff\xff\xff\xff\xff\xff\xfe", -2),
    ],
)
def test_numbers_are_read_in_all_their_spellings(field: bytes, value: int) -> None:
    assert headers.number(field, "field") == value


@pytest.mark.parametrize(
    "field", [b"00009\0\0\0", b"-000644\0", b"0_000_4\0", b"0o00644\0", b"x\0"]
)
def test_what_is_no_number_is_refused(field: bytes) -> None:
    with pytest.raises(HeaderError):
        headers.number(field, "field")


@pytest.mark.parametrize(
    "body",
    [
        b"4 a=\n",  # its length is 5
        b"7 a=bc\n8 b",
        b"6 abc\n",
        b"x a=b\n",
        b"6 a=bc",
        b"-7 a=bc\n",
        b"0 a=b\n",
        b"6 =bc\n",
        b"99999999999999999999999999 a=b\n",
        b"7 a=bcd",
    ],
)
def test_malformed_pax_records_are_refused(body: bytes) -> None:
    with pytest.raises(HeaderError):
        headers.parse_pax(body)


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=50), st.binary(max_size=200))))
def test_pax_records_come_back_in_order(pairs: list[tuple[bytes, bytes]]) -> None:
    pairs = [(key.replace(b"=", b"."), value) for key, value in pairs]
    body = b"".join(headers._record(key, value) for key, value in pairs)
    assert headers.parse_pax(body) == pairs
