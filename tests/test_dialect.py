"""The two ways to write a whiteout: names, marks on a layer, conversion killed at any line."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from aufsd.store import dialect as marks
from aufsd.store import whiteouts
from aufsd.store.dialect import WITH_MARKS, Dialect
from tests.archive.converting import build, convert, convert_until
from tests.archive.shelf import NAMESPACE, Entry, snapshot

OPAQUE = f"{NAMESPACE}.overlay.opaque"
CONVERTING = f"{NAMESPACE}.aufsd.converting"


@pytest.mark.parametrize(
    ("name", "deleted"),
    [
        (b".wh.x", b"x"),
        (b".wh..hidden", b".hidden"),
        (b".wh. ", b" "),
        (b".wh.\xff", b"\xff"),
        (b".wh..w", b".w"),
        (b".wh....", b"..."),
        (b".wh.", None),
        (b".wh..", None),
        (b".wh...", None),
        (b".wh..wh.x", None),
        (b".wh..wh..opq", None),
        (b".wh..wh.aufs", None),
        (b".whx", None),
        (b"x.wh.y", None),
    ],
)
def test_what_a_whiteout_deletes(name: bytes, deleted: bytes | None) -> None:
    assert whiteouts.deleted_name(name) == deleted


pytestmark = pytest.mark.mounts


def test_the_dialect_is_an_attribute_of_the_layer(tmp_path: Path) -> None:
    assert marks.read_dialect(tmp_path, NAMESPACE) is Dialect.AUFS
    assert marks.xattrs(Dialect.AUFS, NAMESPACE) == {}
    for name, value in marks.xattrs(Dialect.OVERLAY, NAMESPACE).items():
        os.setxattr(tmp_path, name, value)
    assert marks.read_dialect(tmp_path, NAMESPACE) is Dialect.OVERLAY
    marks.write_dialect(tmp_path, Dialect.AUFS, NAMESPACE)
    marks.write_dialect(tmp_path, Dialect.AUFS, NAMESPACE)
    assert marks.read_dialect(tmp_path, NAMESPACE) is Dialect.AUFS
    os.setxattr(tmp_path, f"{NAMESPACE}.aufsd.dialect", b"klingon")
    with pytest.raises(OSError, match="klingon"):
        marks.read_dialect(tmp_path, NAMESPACE)


def test_an_opaque_root_is_seen_in_both(tmp_path: Path) -> None:
    path = str(tmp_path)
    for dialect in WITH_MARKS:
        assert not whiteouts.is_opaque_root(path, dialect, NAMESPACE)
    os.setxattr(path, OPAQUE, b"x")  # of overlayfs too, and means something else
    assert not whiteouts.is_opaque_root(path, Dialect.OVERLAY, NAMESPACE)
    os.setxattr(path, OPAQUE, b"y")
    assert whiteouts.is_opaque_root(path, Dialect.OVERLAY, NAMESPACE)
    (tmp_path / ".wh..wh..opq").touch()
    assert whiteouts.is_opaque_root(path, Dialect.AUFS, NAMESPACE)


def times(at: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in (at / "d" / "e", at / "d", at / "opaque", at)]


def content(at: Path) -> dict[bytes, Entry]:
    return snapshot(at)


@pytest.mark.parametrize("source", WITH_MARKS)
def test_there_and_back_nothing_is_lost(tmp_path: Path, source: Dialect) -> None:
    target = next(dialect for dialect in WITH_MARKS if dialect is not source)
    here, there = tmp_path / "here", tmp_path / "there"
    for path, dialect in ((here, source), (there, target)):
        path.mkdir(0o755)
        build(path, dialect)
    marks.write_dialect(here, source, NAMESPACE)
    before = content(here)
    exact = times(here)
    assert convert(here, target) == 0
    assert marks.read_dialect(here, NAMESPACE) is target
    assert content(here) == content(there)
    assert times(here) == exact
    assert convert(here, source) == 0
    assert content(here) == before
    assert times(here) == exact


@pytest.mark.parametrize("source", WITH_MARKS)
def test_killed_at_any_line_it_is_finished_by_the_next(tmp_path: Path, source: Dialect) -> None:
    target = next(dialect for dialect in WITH_MARKS if dialect is not source)
    wanted = tmp_path / "wanted"
    wanted.mkdir(0o755)
    build(wanted, target)
    expected, exact = content(wanted), times(wanted)
    lines, step, seen_half = 1, 7, 0
    while True:
        at = tmp_path / str(lines)
        at.mkdir(0o755)
        build(at, source)
        marks.write_dialect(at, source, NAMESPACE)
        status = convert_until(at, target, lines)
        if status == 0:
            break
        assert status == -9
        half = marks.interrupted(at, NAMESPACE)
        seen_half += half is target
        assert half in (None, target)
        assert convert_until(at, target, -1) == 0
        assert content(at) == expected, lines
        assert times(at) == exact, lines
        assert not [n for n in os.listxattr(at) if n.endswith((".converting", ".times"))]
        lines += step
    assert seen_half > 10


def test_a_conversion_cut_off_can_be_turned_back(tmp_path: Path) -> None:
    wanted = tmp_path / "wanted"
    wanted.mkdir(0o755)
    build(wanted, Dialect.AUFS)
    at = tmp_path / "at"
    at.mkdir(0o755)
    build(at, Dialect.AUFS)
    assert convert_until(at, Dialect.OVERLAY, 200) == -9
    assert marks.interrupted(at, NAMESPACE) is Dialect.OVERLAY
    assert convert(at, Dialect.AUFS) == 0
    assert content(at) == content(wanted)
    assert times(at) == times(wanted)


def test_aufs_housekeeping_goes(tmp_path: Path) -> None:
    (tmp_path / ".wh..wh.aufs").touch()
    os.link(tmp_path / ".wh..wh.aufs", tmp_path / ".wh.x")
    (tmp_path / ".wh..wh.plnk" / "sub").mkdir(parents=True)
    (tmp_path / ".wh..wh.orph").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ".wh..wh.tmp.0001").mkdir()
    (tmp_path / "d" / ".wh.").touch()
    assert convert(tmp_path, Dialect.OVERLAY) == 0
    assert sorted(os.listdir(tmp_path)) == ["d", "x"]
    assert os.listdir(tmp_path / "d") == []


def test_a_name_beside_its_whiteout_is_there_and_hides_what_lies_below(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1")
    (tmp_path / "d").mkdir()
    for name in ("f", "d"):
        (tmp_path / f".wh.{name}").touch()
    assert convert(tmp_path, Dialect.OVERLAY) == 0
    assert (tmp_path / "f").read_bytes() == b"1"
    assert os.getxattr(tmp_path / "d", OPAQUE) == b"y"
    assert sorted(os.listdir(tmp_path)) == ["d", "f"]


def test_what_overlayfs_noted_is_stripped(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "f").touch()
    (tmp_path / "l").symlink_to("f")
    marks.write_dialect(tmp_path, Dialect.OVERLAY, NAMESPACE)
    paths = [tmp_path, tmp_path / "d", tmp_path / "f"]
    if NAMESPACE == "trusted":
        paths.append(tmp_path / "l")
    for path in paths:
        for name in ("origin", "impure", "nlink", "uuid"):
            os.setxattr(path, f"{NAMESPACE}.overlay.{name}", b"x", follow_symlinks=False)
    assert convert(tmp_path, Dialect.AUFS) == 0
    for path in paths:
        assert not [n for n in os.listxattr(path, follow_symlinks=False) if ".overlay." in n]


def refused(tmp_path: Path, target: Dialect) -> None:
    """Nothing at all is changed, not even a mark is set."""
    before = subprocess.run(["find", tmp_path, "-ls"], capture_output=True).stdout
    assert convert(tmp_path, target) == 1
    assert subprocess.run(["find", tmp_path, "-ls"], capture_output=True).stdout == before
    assert CONVERTING not in os.listxattr(tmp_path)


def test_a_device_that_would_become_a_whiteout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / ".wh.x").touch()
    os.mknod(tmp_path / "d" / "dev", stat.S_IFCHR, 0)
    refused(tmp_path, Dialect.OVERLAY)


@pytest.mark.parametrize("name", ["redirect", "metacopy"])
def test_a_layer_that_is_not_whole_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "d").mkdir()
    os.setxattr(tmp_path / "d", f"{NAMESPACE}.overlay.{name}", b"/x")
    marks.write_dialect(tmp_path, Dialect.OVERLAY, NAMESPACE)
    refused(tmp_path, Dialect.AUFS)


@pytest.mark.parametrize("name", [".wh.data", "x" * 252])
def test_a_name_that_aufs_has_no_way_to_say_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "d").mkdir()
    if name.startswith("."):
        (tmp_path / "d" / name).touch()
    else:
        os.mknod(tmp_path / "d" / name, stat.S_IFCHR, 0)
    marks.write_dialect(tmp_path, Dialect.OVERLAY, NAMESPACE)
    refused(tmp_path, Dialect.AUFS)
