"""A label on everything that a layer holds, set by an archive job; and the sizes of layers."""

import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aufsd.archive.jobs import Jobs, open_jobs
from aufsd.archive.relabel import XATTR
from aufsd.archive.requests import Limits
from aufsd.store.layout import Layout
from aufsd.union.btrfs import parse_size
from aufsd_client.errors import InternalError, InvalidParams

LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


@pytest.fixture
async def jobs(tmp_path: Path) -> AsyncIterator[Jobs]:
    """Archive jobs; every directory can be given to them."""
    layout = Layout(str(tmp_path / "store"))
    os.makedirs(layout.private)
    async with open_jobs(layout, uid_maps=(), gid_maps=(), limits=Limits(), sync="none") as made:
        yield made


def labels(top: Path) -> dict[str, bytes]:
    """The label of every inode below a directory that has one, and its own."""
    found = {}
    for directory, names, files in os.walk(top):
        for path in (directory, *(f"{directory}/{name}" for name in (*names, *files))):
            if XATTR in os.listxattr(path, follow_symlinks=False):
                found[path] = os.getxattr(path, XATTR, follow_symlinks=False)
    return found


def inodes(top: Path) -> set[str]:
    return {str(top)} | {str(path) for path in top.rglob("*")}


@pytest.mark.service
async def test_every_kind_of_inode_is_labelled_and_nothing_outside(
    jobs: Jobs, tmp_path: Path
) -> None:
    outside, top = tmp_path / "outside", tmp_path / "layer"
    outside.mkdir()
    (outside / "file").touch()
    (top / "a/b/c").mkdir(parents=True)
    (top / "file").write_text("x")
    (top / "file").chmod(0o4755)
    (top / "unreadable").touch(mode=0)
    (top / "a/to-file").symlink_to(outside / "file")
    (top / "to-directory").symlink_to(outside)
    (top / "a/dangling").symlink_to("nowhere")
    os.mkfifo(top / "a/fifo")
    os.mknod(top / "a/b/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.link(top / "file", top / "a/b/c/linked")
    (top / os.fsdecode(b"\xff\xfe")).touch()
    before = {path: os.lstat(path).st_mtime_ns for path in inodes(top)}
    # the hard link is one inode, set twice
    assert await jobs.relabel("layer", str(top), LABEL) == len(inodes(top))
    assert labels(top) == dict.fromkeys(inodes(top), LABEL.encode())
    assert labels(outside) == {}
    assert {path: os.lstat(path).st_mtime_ns for path in inodes(top)} == before
    assert stat.S_IMODE((top / "file").stat().st_mode) == 0o4755


@pytest.mark.service
async def test_what_has_the_label_is_skipped(jobs: Jobs, tmp_path: Path) -> None:
    top = tmp_path / "layer"
    (top / "d").mkdir(parents=True)
    for name in ("a", "b", "d/c"):
        (top / name).touch()
    assert await jobs.relabel("layer", str(top), LABEL) == 5
    assert await jobs.relabel("layer", str(top), LABEL) == 0
    (top / "new").touch()
    os.setxattr(top / "a", XATTR, b"other")
    # as a kernel with SELinux gives it back
    os.setxattr(top / "b", XATTR, LABEL.encode() + b"\0")
    assert await jobs.relabel("layer", str(top), LABEL) == 2
    assert {value.rstrip(b"\0") for value in labels(top).values()} == {LABEL.encode()}


@pytest.mark.service
async def test_wide_and_deep_directories(jobs: Jobs, tmp_path: Path) -> None:
    """More names than one batch, more levels than a path can name, more directories than wait."""
    top = tmp_path / "layer"
    (top / "wide").mkdir(parents=True)
    for number in range(700):
        (top / f"wide/{number}").touch()
    for number in range(200):
        (top / f"many/{number}").mkdir(parents=True)
    here = os.open(top, os.O_RDONLY)
    levels, name = 30, "n" * 200
    for _ in range(levels):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    assert await jobs.relabel("layer", str(top), LABEL) == 1 + 701 + 201 + levels
    assert os.getxattr(here, XATTR) == LABEL.encode()
    os.close(here)


@pytest.mark.service
async def test_a_file_system_that_takes_no_label_is_an_error(jobs: Jobs) -> None:
    with pytest.raises(InternalError):
        await jobs.relabel("layer", "/proc/sys", LABEL)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("10G", 10 << 30), ("1g", 1 << 30), ("512m", 512 << 20), ("64KiB", 64 << 10)),
        *(("2 TB", 2 << 40), ("1000", 1000), ("1b", 1), (" 3p ", 3 << 50)),
    ],
)
def test_sizes_are_read_as_docker_reads_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "1.5G", "10X", "0", "0G", "9999999P", "1e3", "\u0661", "9" * 5000]
)
def test_any_other_is_no_size(text: str) -> None:
    with pytest.raises(InvalidParams):
        parse_size(text)
