"""What other tools write and read is taken; what is not is named, with the command to use."""

import bz2
import lzma
import os
import tarfile
from pathlib import Path

import pytest

from aufsd.archive import errnos, headers
from aufsd.archive.fork import ForkServer
from aufsd.store.dialect import WITH_MARKS, Dialect
from aufsd_client.errors import AufsdError, BadArchive, InternalError, LayerDamaged, NoSpace
from tests.archive.shelf import NAMESPACE, Shelf, open_shelf
from tests.archive.tars import directory, entry, link, symlink, tar

pytestmark = pytest.mark.mounts


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        (b"0000644\0", 0o644),
        (b"\x000000644", 0o644),
        (b"\0 644 \0\0", 0o644),
        (b"   644 \0", 0o644),
        (b"644 junk", 0o644),
        (b"644\0\xff\xff\xff\xff", 0o644),
        (b"        ", 0),
        (b"\0\0\0\0\0\0\0\0", 0),
        (b"\x80\0\0\0\0\0\1\0", 256),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff", -1),
    ],
)
def test_numbers_are_read_as_gnu_tar_and_go_read_them(field: bytes, meant: int) -> None:
    assert headers.number(field, "mode") == meant


@pytest.mark.parametrize(
    "field", [b"0o00644\0", b"+644    ", b"6_44   \0", b"0000648\0", b"-1\0\0\0\0\0\0"]
)
def test_what_is_no_number_is_refused(field: bytes) -> None:
    with pytest.raises(headers.HeaderError):
        headers.number(field, "mode")


async def test_a_record_without_a_value_leaves_the_headers_own(shelf: Shelf) -> None:
    at = shelf.add("a")
    empty = dict.fromkeys(("path", "mtime", "size", "uid", "gid"), "")
    await shelf.apply(tar(entry("f", b"abc", pax_headers=empty)), "a")
    assert (at / "f").read_bytes() == b"abc"
    assert (at / "f").stat().st_mtime == 1_500_000_000


@pytest.mark.parametrize(
    "seconds", ["-99999999999999", "9" * 30, "99999999999999", "-9223372036854775808"]
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
async def test_a_time_is_no_reason_to_refuse_a_layer(
    shelf: Shelf, seconds: str, kind: bytes
) -> None:
    """The file system takes the nearest that it has, or all of it."""
    at = shelf.add("a")
    made = entry("f", type=kind, linkname="x", pax_headers={"mtime": seconds})
    result = await shelf.apply(tar(made), "a")
    kept = (at / "f").lstat().st_mtime_ns // 10**9
    if kept == int(seconds):
        assert result.warnings == []
    else:
        assert result.warnings == [
            f"the time of f is none that the file system keeps; it is {kept} seconds since 1970 now"
        ]


@pytest.mark.parametrize("name", ["", ".", "./", "/", "//", "a/.."])
@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, b"D"])
async def test_the_root_under_every_name(shelf: Shelf, name: str, kind: bytes) -> None:
    at = shelf.add("a")
    root = headers.encode(name.encode(), kind, mode=0o711, uid=0, gid=0, mtime=77)
    await shelf.apply(root + tar(entry("f", b"x")), "a")
    assert (at.stat().st_mode & 0o7777, at.stat().st_mtime) == (0o711, 77)
    assert (at / "f").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["", "./x/.."])
async def test_nothing_else_is_the_root(shelf: Shelf, name: str) -> None:
    shelf.add("a")
    other = headers.encode(name.encode(), headers.SYMLINK, mode=0o777, uid=0, gid=0, link=b"/etc")
    with pytest.raises(AufsdError) as caught:
        await shelf.apply(other + tar(), "a")
    assert caught.value.code in (301, 302)


async def test_without_an_entry_for_it_the_root_of_a_base_layer_has_a_fixed_time(
    shelf: Shelf,
) -> None:
    """One tar, one digest."""
    at = shelf.add("a")
    await shelf.apply(tar(entry("f", b"x")), "a")
    assert at.stat().st_mtime == 0
    above = shelf.add("b")
    os.utime(above, (5, 5))
    await shelf.apply(tar(entry("f", b"x")), "b", "a")
    assert above.stat().st_mtime == 5


@pytest.mark.parametrize("dialect", WITH_MARKS)
async def test_a_name_that_is_linked_to_itself_is_passed_over(
    shelf: Shelf, dialect: Dialect
) -> None:
    at = shelf.add("a", dialect)
    stream = tar(
        entry("a", b"body"),
        link("a", "./a"),
        link("b", "a"),
        link("b", "a"),
        directory("d"),
        entry("d/f", b"other"),
        symlink("s", "d"),
        # the same file by two ways
        link("s/f", "d/f"),
    )
    await shelf.apply(stream, "a")
    assert (at / "a").read_bytes() == (at / "b").read_bytes() == b"body"
    assert (at / "d" / "f").read_bytes() == b"other"
    assert (at / "a").stat().st_nlink == 2


async def test_a_link_to_itself_of_what_is_not_there_is_refused(shelf: Shelf) -> None:
    shelf.add("a")
    with pytest.raises(BadArchive, match="which the archive has not put"):
        await shelf.apply(tar(link("a", "a")), "a")


async def test_an_attribute_in_libarchives_form_alone_is_named(shelf: Shelf) -> None:
    at = shelf.add("a")
    records = {
        "LIBARCHIVE.xattr.user.a%20b": "djE",
        "LIBARCHIVE.xattr.user.c": "djE",
        "SCHILY.xattr.user.c": "v1",
    }
    result = await shelf.apply(tar(entry("f", pax_headers=records)), "a")
    assert [warning.split(":")[0] for warning in result.warnings] == [
        "dropped the attribute user.a b of f"
    ]
    assert os.getxattr(at / "f", "user.c") == b"v1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("user." + "k" * 251, "v"),
        ("user." + "k" * 295, "v"),
        ("security.capability", ""),
        ("security.capability", "1"),
        ("user.large", "v" * 65_537),
        ("user.", "v"),
    ],
)
async def test_an_attribute_that_nothing_takes_is_dropped_with_a_warning(
    shelf: Shelf, name: str, value: str
) -> None:
    at = shelf.add("a")
    result = await shelf.apply(
        tar(entry("f", b"x", pax_headers={f"SCHILY.xattr.{name}": value})), "a"
    )
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("dropped the attribute")
    assert (at / "f").read_bytes() == b"x"
    assert name not in os.listxattr(at / "f")


async def test_more_attributes_than_the_kernel_lists_are_not_given_to_a_file(shelf: Shelf) -> None:
    """Beyond 64 KiB of names listxattr(2) fails, and nobody could read the layer again."""
    at = shelf.add("a")
    records = {f"SCHILY.xattr.user.{number:0200}": "v" for number in range(400)}
    result = await shelf.apply(tar(entry("f", pax_headers=records)), "a")
    assert sum(len(name) + 1 for name in os.listxattr(at / "f")) <= 60 << 10
    assert result.warnings


XZ, BZ2 = lzma.compress(tar(entry("f"))), bz2.compress(tar(entry("f")))


@pytest.mark.parametrize(
    ("stream", "command"),
    [
        (XZ, "xz -dc"),
        (BZ2, "bzip2 -dc"),
        (b"\x04\x22\x4d\x18" + bytes(600), "lz4 -dc"),
        (b"PK\3\4" + bytes(600), "bsdtar"),
        (b"!<arch>\ndebian-binary", "data.tar.gz"),
    ],
)
async def test_what_is_no_tar_is_told_by_name_with_the_command(
    shelf: Shelf, stream: bytes, command: str
) -> None:
    shelf.add("a")
    with pytest.raises(BadArchive, match=command):
        await shelf.apply(stream, "a")


async def test_a_tar_may_begin_with_such_a_name(shelf: Shelf) -> None:
    at = shelf.add("a")
    await shelf.apply(tar(entry("BZh", b"x"), entry("PK\3\4", b"y")), "a")
    assert (at / "BZh").read_bytes() == b"x"


def sparse(*extents: tuple[bytes, bytes]) -> bytes:
    """GNU tar's old form: the map goes on in blocks behind the header."""
    block = bytearray(headers.encode(b"s", b"S", mode=0o644, uid=0, gid=0))
    block[257:265] = b"ustar  \0"
    block[386:410] = b"%011o\0%011o\0" % (0, 0)
    block[482] = 1
    block[483:495] = b"%011o\0" % 10
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    piece = b"".join(b"%b%b" % pair for pair in extents)
    return bytes(block) + piece


async def test_a_sparse_map_of_nothing_takes_no_memory(tmp_path: Path, server: ForkServer) -> None:
    async with open_shelf(tmp_path, server) as shelf:
        at = shelf.add("a")
        nothing = (b"%011o\0%011o\0" % (0, 0)) * 21
        stream = sparse() + (nothing + b"\1" + bytes(7)) * 1000 + nothing + bytes(8) + bytes(1024)
        await shelf.apply(stream, "a")
        assert (at / "s").stat().st_size == 10


@pytest.mark.parametrize("size", [2**63 - 1, 2**63, 2**62, 10**18 * 9])
async def test_a_size_that_no_file_has_is_a_sentence(shelf: Shelf, size: int) -> None:
    shelf.add("a")
    records = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(size)}
    with pytest.raises(BadArchive) as caught:
        await shelf.apply(tar(entry("s", pax_headers=records)), "a")
    assert caught.value.data["entry"] == "s"


async def test_a_header_of_many_attributes_takes_time_in_proportion(shelf: Shelf) -> None:
    """A megabyte of records once took a quarter of a minute."""
    shelf.add("a")
    records = {f"SCHILY.xattr.bad.{number}": "" for number in range(30_000)}
    result = await shelf.apply(tar(entry("f", pax_headers=records)), "a")
    assert len(result.warnings) == 101


def test_every_errno_of_the_table_is_an_answer_with_a_sentence() -> None:
    for number, row in errnos.ANSWERS.items():
        found = errnos.answer(OSError(number, os.strerror(number)), b"a/b", offset=3)
        assert type(found) is row.kind
        assert not isinstance(found, InternalError)
        assert found.data["entry"] == "a/b"
        assert found.message.startswith("a/b: ")
        assert os.strerror(number) in found.message
        assert not isinstance(found, LayerDamaged) or found.data["problem"]


async def test_part_of_a_layer_that_lies_elsewhere_is_a_sentence(shelf: Shelf) -> None:
    at = shelf.add("a", Dialect.OVERLAY)
    (at / "d").mkdir()
    os.setxattr(at / "d", f"{NAMESPACE}.overlay.redirect", b"/else")
    with pytest.raises(LayerDamaged, match="lies in another layer"):
        await shelf.diff("a")


def test_no_space_and_no_room_for_an_attribute_are_told_apart(tmp_path: Path) -> None:
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        full = OSError(28, "No space left on device")
        assert errnos.is_attribute_refused(full)
        assert isinstance(errnos.answer(full), NoSpace)
    finally:
        os.chdir(before)


async def test_a_page_of_changes_is_bounded_in_bytes(shelf: Shelf) -> None:
    """One deep path of long names: each page is small, and all of them together are whole."""
    shelf.add("a")
    deep = "/".join(["n" * 255] * 400)
    await shelf.apply(tar(entry(f"{deep}/f")), "a")
    after, paths, pages = "", 0, 0
    while True:
        page = await shelf.jobs.changes(shelf.chain("a"), against=(), after=after)
        assert sum(len(str(change.path)) for change in page.changes) < (4 << 20) + len(deep) + 3
        paths, pages, after = paths + len(page.changes), pages + 1, page.next
        if not after:
            break
    assert (paths, pages > 1) == (401, True)
