"""Whiteouts that are xattrs of empty files, which overlayfs reads and never makes (Linux 6.8)."""

import os
from pathlib import Path

import pytest

from aufsd.store import whiteouts
from aufsd.store.dialect import WITH_MARKS, Dialect
from aufsd_client.errors import LayerDamaged
from tests.archive.shelf import NAMESPACE, Shelf, snapshot
from tests.archive.tars import listing
from tests.archive.test_changes import mounted

pytestmark = pytest.mark.mounts

OPAQUE, WHITEOUT = f"{NAMESPACE}.overlay.opaque", f"{NAMESPACE}.overlay.whiteout"
RELEASE = tuple(int(part) for part in os.uname().release.split(".")[:2])


def fill(base: Path, top: Path) -> None:
    """`gone` and `d/gone` are deleted; `empty` and `full` are files."""
    (base / "d").mkdir()
    for name in ("gone", "stays", "d/gone", "d/stays", "d/empty"):
        (base / name).write_bytes(b"below")
    (top / "d").mkdir()
    for name in ("gone", "d/gone", "empty", "d/empty"):
        (top / name).touch()
    for name in ("gone", "d/gone"):
        os.setxattr(top / name, WHITEOUT, b"")
    # one that holds something is a file
    (top / "d" / "full").write_bytes(b"x")
    os.setxattr(top / "d" / "full", WHITEOUT, b"")
    for directory in (top, top / "d"):
        os.setxattr(directory, OPAQUE, b"x")


@pytest.fixture
def at(shelf: Shelf) -> Path:
    base, top = shelf.add("base", Dialect.OVERLAY), shelf.add("top", Dialect.OVERLAY)
    fill(base, top)
    return top


NAMES = [".", ".wh.gone", "d", "d/.wh.gone", "d/empty", "d/full", "empty"]


async def test_a_diff_tells_them_as_whiteouts(shelf: Shelf, at: Path) -> None:
    stream, result = await shelf.pack("top", "base")
    assert [member.name for member in listing(stream)] == NAMES
    assert result.warnings == []
    compared = await shelf.diff("top", "base", against=("base",))
    assert sorted(member.name for member in listing(compared)) == sorted(NAMES)


async def test_changes_tell_what_they_delete(shelf: Shelf, at: Path) -> None:
    found = await shelf.jobs.changes(shelf.chain("top", "base"), against=shelf.chain("base"))
    assert [(change.kind, change.path) for change in found.changes] == [
        ("modify", "/d"),
        ("modify", "/d/empty"),
        ("add", "/d/full"),
        ("delete", "/d/gone"),
        ("add", "/empty"),
        ("delete", "/gone"),
    ]


@pytest.mark.parametrize("dialect", WITH_MARKS)
async def test_they_come_back_as_those_of_the_dialect(
    shelf: Shelf, at: Path, dialect: Dialect
) -> None:
    stream = await shelf.diff("top", "base")
    shelf.add("copy", dialect)
    await shelf.apply(stream, "copy", "base")
    assert await shelf.diff("copy", "base") == stream
    if dialect is Dialect.OVERLAY:
        assert whiteouts.is_whiteout_node((shelf.path("copy") / "d" / "gone").lstat())


@pytest.mark.skipif(RELEASE < (6, 8), reason="this kernel does not read them")
async def test_overlayfs_sees_what_we_see(shelf: Shelf, at: Path, tmp_path: Path) -> None:
    (tmp_path / "view").mkdir()
    stream = await shelf.diff("top", "base")
    shelf.add("copy", Dialect.OVERLAY)
    await shelf.apply(stream, "copy", "base")
    seen = []
    for id in ("top", "copy"):
        with mounted([shelf.path(id), shelf.path("base")], tmp_path / "view") as view:
            shown = {name for name in names_in(view) if os.path.lexists(view / name)}
            assert not (view / "gone").exists()
            assert not (view / "d" / "gone").exists()
            seen.append(shown)
    assert seen[0] == seen[1]
    assert seen[0] == {"d", "d/empty", "d/full", "d/stays", "empty", "stays"}


def names_in(view: Path) -> set[str]:
    return {str(path.relative_to(view)) for path in view.rglob("*")}


async def test_without_the_mark_on_the_root_they_are_files(shelf: Shelf, at: Path) -> None:
    """As for overlayfs."""
    os.removexattr(at, OPAQUE)
    names = [member.name for member in listing(await shelf.diff("top", "base"))]
    assert names == [".", "d", "d/empty", "d/full", "d/gone", "empty", "gone"]


async def test_such_a_layer_is_not_converted(shelf: Shelf, at: Path) -> None:
    before = snapshot(at)
    with pytest.raises(LayerDamaged, match=r"gone.*overlay\.whiteout"):
        await shelf.jobs.convert("top", Dialect.AUFS)
    assert snapshot(at) == before
