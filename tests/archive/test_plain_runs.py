"""Runs of plain files take fewer steps, and give what they would give one by one."""

import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aufsd.archive import headers
from aufsd.archive.fork import ForkServer
from aufsd.archive.meter import Meter
from aufsd.archive.reader import Reader
from aufsd.archive.requests import Limits
from aufsd.archive.source import Source
from aufsd.store.dialect import Dialect
from aufsd.store.idmap import IdMap
from aufsd_client.errors import ArchiveEscape, BadArchive, LimitExceeded
from tests.archive.shelf import Shelf, needs_root, open_shelf, snapshot
from tests.archive.tars import directory, entry, link, symlink, tar


class Read(NamedTuple):
    """What a reader says of an entry."""

    name: bytes
    kind: bytes
    owner: tuple[int, int, int]
    mtime: int
    content: bytes
    entries: int


def read(stream: bytes, prefix: bytes | None) -> list[Read] | type[BadArchive]:
    """The entries of a tar; those whose names begin with `prefix` in runs, where it is given."""
    fd = os.memfd_create("tar")
    os.write(fd, stream)
    os.lseek(fd, 0, os.SEEK_SET)
    meter = Meter(lambda size, entries: None)
    reader = Reader(Source(fd, meter, digest=False), meter)
    found = []
    try:
        for member in reader.members():
            body = reader.small_body(member.size) or b""
            owner = (member.mode, member.uid, member.gid)
            found.append(
                Read(member.name, member.kind, owner, member.mtime, bytes(body), meter.entries)
            )
            if prefix is not None:
                found += [
                    Read(prefix + name, b"0", who, mtime, bytes(body), meter.entries + 1)
                    for name, who, mtime, body in reader.plain(prefix)
                ]
    except BadArchive as error:
        return type(error)
    finally:
        os.close(fd)
    return found


ROWS = st.lists(
    st.builds(
        lambda name, data, fields: entry(name, data, **fields),
        st.sampled_from(["d/a", "d/b", "d/c", "d/", "d", "d/e/f", "e", "d/" + "n" * 120]),
        st.binary(max_size=1500),
        st.fixed_dictionaries(
            {},
            optional={
                "mode": st.sampled_from([0o600, 0o4755]),
                "uid": st.sampled_from([0, 7, 1 << 22]),
                "mtime": st.one_of(st.integers(-5, 1 << 35), st.floats(-5, 1 << 33)),
                "type": st.sampled_from([b"0", b"\0", b"7", b"5", b"1", b"6"]),
                "pax_headers": st.dictionaries(
                    st.sampled_from(["atime", "ctime", "mtime", "path", "comment", "size"]),
                    st.sampled_from(["1", "1.5", "-1", "x", "d/z", "1.0000000001"]),
                    max_size=2,
                ),
            },
        ),
    ),
    max_size=6,
)


@given(ROWS, st.data())
@example([entry("d/a", b"x"), entry("d/b", b"y", mtime=1.25), entry("d/c", mtime=9e9)], None)
def test_a_run_is_what_its_members_are(
    rows: list[tuple[tarfile.TarInfo, bytes]], data: st.DataObject | None
) -> None:
    stream = bytearray(tar(*rows))
    if data is not None and rows and data.draw(st.booleans()):
        # anywhere, so mostly where nothing says anything
        at = data.draw(st.integers(0, 512 * len(rows)))
        stream[at] = data.draw(st.integers(0, 255))
    assert read(bytes(stream), b"d/") == read(bytes(stream), None)


STAMPS = st.one_of(
    st.from_regex(rb"[0-9]{1,12}(\.[0-9]{1,10})?", fullmatch=True),
    st.sampled_from([b"", b".5", b"5.", b"1..5", b"-1.5", b"x", b"1.5\n"]),
)


@settings(deadline=None)
@given(STAMPS, STAMPS, STAMPS, st.sampled_from([0, 0, 0, 1, -1]), st.integers(0, 2))
@example(b"1795529725.749534660", b"1795529725.7", b"1795529725.749534660", 0, 0)
@example(b"1795529725.749534660", b"1795529725.7", b"1795529725.749534660", 1, 1)
def test_the_times_that_gnu_tar_writes_are_what_their_records_say(
    mtime: bytes, atime: bytes, ctime: bytes, off: int, which: int
) -> None:
    """In a run they are found in one step, where each is as long as it says."""
    records = []
    for index, (key, value) in enumerate(((b"mtime", mtime), (b"atime", atime), (b"ctime", ctime))):
        size = len(value) + 10 + (off if index == which else 0)
        records.append(b"%02d %b=%b\n" % (size, key, value))
    body = b"".join(records)
    before = tarfile.TarInfo("d/b")
    before.type, before.size = b"x", len(body)
    stream = tar(entry("d/a"))[:512] + before.tobuf(tarfile.USTAR_FORMAT)
    stream += body + bytes(-len(body) % 512) + tar(entry("d/b", b"y"))
    assert read(stream, b"d/") == read(stream, None)


def test_a_run_goes_on_as_long_as_files_are_plain() -> None:
    """Or the test above would say nothing."""
    files = [entry(f"d/{n}", b"x", mtime=n + 0.25) for n in range(8)]
    # as GNU tar writes what has a whole second for its time
    files.append(entry("d/8", b"x", mtime=8, pax_headers={"atime": "9.5", "ctime": "7"}))
    stream = tar(*files, directory("d/e"))
    fd = os.memfd_create("tar")
    os.write(fd, stream)
    os.lseek(fd, 0, os.SEEK_SET)
    meter = Meter(lambda size, entries: None)
    reader = Reader(Source(fd, meter, digest=False), meter)
    assert next(reader.members()).name == b"d/0"
    assert [name for name, _, _, _ in reader.plain(b"d/")] == [b"%d" % n for n in range(1, 9)]
    os.close(fd)


# --- what the unpacker makes of them ------------------------------------------------------------


def plain(*names: str, **fields: object) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [entry(name, name.encode(), **fields) for name in names]


@pytest.mark.mounts
async def test_what_ends_a_run_is_as_it_would_be_alone(shelf: Shelf) -> None:
    """In one archive: each of these stands between files that make runs."""
    unusual = [
        entry("d/setuid", b"s", mode=0o4755),
        entry("d/a", b"again"),
        entry("d/" + "n" * 120, b"long"),
        entry("d/sub/file", b"implies"),
        entry("./d/dotted", b"dot"),
        entry("d/old", b"1970", mtime=0),
        entry("d/older", b"1969", mtime=-1),
        entry("d/large", bytes(70_000) + b"x"),
        entry("d/xattr", b"x", pax_headers={"SCHILY.xattr.user.a": "b"}),
        entry("d/empty"),
        symlink("d/symlink", "a"),
        link("d/link", "d/a"),
        entry("d/.wh.gone"),
        entry("e/other", b"directory"),
    ]
    rows = plain("d/a", "d/b")
    for number, row in enumerate(unusual):
        rows += [row, *plain(f"d/p{number}", f"d/q{number}")]
    together = shelf.add("together")
    result = await shelf.apply(tar(*rows), "together")
    alone = shelf.add("alone")
    for row in rows:
        await shelf.apply(tar(row), "alone") if row[0].type != tarfile.LNKTYPE else None
    os.link(alone / "d" / "a", alone / "d" / "link")
    # each archive by itself gave what it implies its own time
    for directory_ in ("d", "d/sub", "e", "."):
        for at in (together, alone):
            os.utime(at / directory_, (0, 0))
    assert snapshot(together) == snapshot(alone)
    assert result.entries == len(rows)


@pytest.mark.mounts
@pytest.mark.parametrize("dialect", [Dialect.AUFS, Dialect.OVERLAY])
async def test_a_file_of_a_run_takes_the_place_of_its_whiteout(
    shelf: Shelf, dialect: Dialect
) -> None:
    shelf.add("a", dialect)
    rows = [*plain("x", "y"), entry(".wh.b"), *plain("a", "b", "c")]
    await shelf.apply(tar(*rows), "a")
    with tarfile.open(fileobj=io.BytesIO(await shelf.diff("a"))) as archive:
        assert archive.getnames() == [".", "a", "b", "c", "x", "y"]


@pytest.mark.mounts
@pytest.mark.parametrize("name", ["d/..", "d/.wh.", "d/.wh..wh.x"])
async def test_names_that_mean_nothing_are_refused_in_a_run_too(shelf: Shelf, name: str) -> None:
    shelf.add("a")
    with pytest.raises((ArchiveEscape, BadArchive)) as caught:
        await shelf.apply(tar(*plain("d/a", "d/b", name)), "a")
    assert caught.value.data["offset"] == 2048


@pytest.mark.mounts
@needs_root
async def test_owners_of_a_run_are_mapped(tmp_path: Path, server: ForkServer) -> None:
    maps = (IdMap(0, 100_000, 1000),)
    async with open_shelf(tmp_path, server, uid_maps=maps, gid_maps=maps) as shelf:
        at = shelf.add("a")
        await shelf.apply(tar(*plain("a", "b", "c"), *plain("d", "e", uid=7, gid=8)), "a")
        assert {path.name: (path.stat().st_uid, path.stat().st_gid) for path in at.iterdir()} == {
            **dict.fromkeys("abc", (100_000, 100_000)),
            **dict.fromkeys("de", (100_007, 100_008)),
        }
        with pytest.raises(BadArchive, match="1000"):
            await shelf.apply(tar(*plain("f", "g"), *plain("h", uid=1000)), "a")


@pytest.mark.mounts
@needs_root
async def test_files_of_a_run_belong_to_whom_they_say_below_a_setgid_directory(
    shelf: Shelf,
) -> None:
    at = shelf.add("a")
    await shelf.apply(tar(directory("d", mode=0o2755, gid=9), *plain("d/a", "d/b", "d/c")), "a")
    assert {path.stat().st_gid for path in (at / "d").iterdir()} == {0}


@pytest.mark.mounts
@pytest.mark.parametrize("limits", [Limits(entries=4), Limits(bytes=9)])
async def test_a_run_ends_at_a_limit(tmp_path: Path, server: ForkServer, limits: Limits) -> None:
    async with open_shelf(tmp_path, server, limits=limits) as shelf:
        shelf.add("enough")
        await shelf.apply(tar(*plain("aa", "bb", "cc", "dd")), "enough")
        shelf.add("more")
        with pytest.raises(LimitExceeded) as caught:
            await shelf.apply(tar(*plain("aa", "bb", "cc", "dd", "ee")), "more")
        assert caught.value.data["entry"] == "ee"


def test_pax_records_by_one_search_are_those_by_their_lengths() -> None:
    assert headers.parse_pax(b"8 a=b=c\n11 a=\nb=c\n\n5 a=\n") == [
        (b"a", b"b=c"),
        (b"a", b"\nb=c\n"),
        (b"a", b""),
    ]
