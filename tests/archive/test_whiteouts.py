"""Whiteouts that hide nothing are kept nowhere, and a directory of them alone is no content."""

import os

import pytest

from aufsd.store.dialect import WITH_MARKS, Dialect
from tests.archive.shelf import Shelf
from tests.archive.tars import directory, entry, link, listing, symlink, tar

pytestmark = pytest.mark.mounts


@pytest.fixture(params=WITH_MARKS)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return Dialect(request.param)


async def names(shelf: Shelf, *ids: str) -> list[str]:
    return [member.name for member in listing(await shelf.diff(*ids))][1:]


async def changed(shelf: Shelf, *ids: str) -> list[tuple[str, str]]:
    found = await shelf.jobs.changes(shelf.chain(*ids), against=shelf.chain(*ids[1:]))
    return [(change.kind, str(change.path)) for change in found.changes]


@pytest.mark.parametrize("first", [0, 1, 2])
async def test_an_opaque_directory_keeps_no_whiteout(
    shelf: Shelf, dialect: Dialect, first: int
) -> None:
    """fuse-overlayfs#306, containerd#4659: in whatever order they come."""
    shelf.add("base")
    await shelf.apply(tar(directory("d"), entry("d/x", b"1")), "base")
    at = shelf.add("top", dialect)
    rows = [entry("d/.wh..wh..opq"), entry("d/.wh.x"), entry("d/new")]
    await shelf.apply(tar(directory("d"), *rows[first:], *rows[:first]), "top", "base")
    assert [name for name in os.listdir(at / "d") if name != ".wh..wh..opq"] == ["new"]
    assert await names(shelf, "top") == ["d", "d/.wh..wh..opq", "d/new"]
    assert await changed(shelf, "top", "base") == [
        ("modify", "/d"),
        ("add", "/d/new"),
        ("delete", "/d/x"),
    ]


async def test_a_directory_that_is_new_in_the_layer_keeps_no_whiteout(
    shelf: Shelf, dialect: Dialect
) -> None:
    base = shelf.add("base")
    (base / "there" / "deep").mkdir(parents=True)
    (base / "file").touch()
    (base / "cut" / "below").mkdir(parents=True)
    at = shelf.add("top", dialect)
    stream = tar(
        *(entry(f"{name}/.wh.x") for name in ("there", "there/deep")),
        *(directory(name) for name in ("new", "there/new", "cut", "cut/below", "link")),
        entry("cut/.wh..wh..opq"),
        *(entry(f"{name}/.wh.x") for name in ("new", "there/new", "cut/below")),
        directory("file"),
        entry("file/.wh.x"),
    )
    await shelf.apply(stream, "top", "base")
    assert [name for name in await names(shelf, "top") if ".wh." in name] == [
        "cut/.wh..wh..opq",
        "there/.wh.x",
        "there/deep/.wh.x",
    ]
    for path in ("new", "there/new", "cut/below", "file"):
        assert os.listdir(at / path) == []


async def test_a_directory_in_which_only_a_whiteout_lies_is_no_content(
    shelf: Shelf, dialect: Dialect
) -> None:
    """umoci#254, kaniko#2308: what was deleted with its directory is not there again."""
    base = shelf.add("base")
    (base / "test").mkdir()
    (base / "test" / "test").touch()
    (base / "kept").mkdir(mode=0o700)
    (base / "kept" / "x").touch()
    shelf.add("top", dialect)
    stream = tar(
        entry("test/.wh.test"),
        entry(".wh.test"),
        entry("nowhere/deep/.wh.x"),
        entry("kept/.wh.x"),
    )
    result = await shelf.apply(stream, "top", "base")
    assert await names(shelf, "top") == [".wh.test", "kept", "kept/.wh.x"]
    assert (shelf.path("top") / "kept").stat().st_mode & 0o777 == 0o700
    assert await changed(shelf, "top", "base") == [
        ("modify", "/kept"),
        ("delete", "/kept/x"),
        ("delete", "/test"),
    ]
    assert result.warnings == []


async def test_a_later_entry_makes_the_directory_of_a_whiteout(
    shelf: Shelf, dialect: Dialect
) -> None:
    base = shelf.add("base")
    (base / "d").mkdir()
    (base / "d" / "x").touch()
    shelf.add("top", dialect)
    stream = tar(entry("d/.wh.x"), entry("d/.wh.y"), directory("d", mode=0o711), entry("d/y"))
    await shelf.apply(stream, "top", "base")
    assert await names(shelf, "top") == ["d", "d/.wh.x", "d/y"]


async def test_a_directory_reached_through_a_symlink_that_is_replaced_keeps_its_own_time(
    shelf: Shelf, dialect: Dialect
) -> None:
    at = shelf.add("a", dialect)
    stream = tar(
        directory("real", mtime=11),
        directory("real/inner", mtime=12),
        symlink("s", "real"),
        entry("s/inner/f", b"x"),
        directory("s/made", mtime=13),
        entry("s/implied/f", b"x", mtime=14),
        # what had that name is another directory now
        directory("s", mtime=21),
        directory("s/inner", mtime=22),
        entry("s/inner/g"),
        entry("s/implied/g", mtime=24),
    )
    await shelf.apply(stream, "a")
    times = {path: (at / path).stat().st_mtime for path in ("real", "real/inner", "real/made")}
    assert times == {"real": 11, "real/inner": 12, "real/made": 13}
    assert (at / "real" / "implied").stat().st_mtime == 14
    if (at / "s").is_symlink():
        return
    assert ((at / "s").stat().st_mtime, (at / "s" / "inner").stat().st_mtime) == (21, 22)


async def test_such_a_symlink_may_become_a_file(shelf: Shelf, dialect: Dialect) -> None:
    at = shelf.add("a", dialect)
    stream = tar(
        symlink("s", "real/deep"),
        entry("real/deep/f", mtime=5),
        entry("s/below/g", b"x", mtime=6),
        entry("s", b"a file", mtime=7),
        link("h", "s"),
    )
    await shelf.apply(stream, "a")
    assert (at / "real" / "deep" / "below").stat().st_mtime == 6
    assert (at / "h").read_bytes() == b"a file"


async def test_a_root_that_is_opaque_stays_so_with_a_second_archive(
    shelf: Shelf, dialect: Dialect
) -> None:
    shelf.add("base")
    await shelf.apply(tar(entry("x", b"1")), "base")
    shelf.add("top", dialect)
    await shelf.apply(tar(entry(".wh..wh..opq"), entry("new")), "top", "base")
    await shelf.apply(tar(entry("more")), "top", "base")
    assert sorted(await changed(shelf, "top", "base")) == [
        *(("add", "/more"), ("add", "/new"), ("delete", "/x")),
    ]
