"""Deleting: all that is ours, whatever users made of it; nothing of anybody else's."""

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd.kernel import syscalls
from aufsd.store import content as contents
from aufsd.store.erase import erase, erase_at
from tests.trees import DEEP, deepen, in_memory, open_descriptors

pytestmark = pytest.mark.mounts


@pytest.fixture
def mounts() -> Iterator[list[str]]:
    """Mount points to unmount in the end."""
    made: list[str] = []
    yield made
    for path in reversed(made):
        syscalls.umount2(path, syscalls.MNT_DETACH)


def everything(top: Path) -> list[str]:
    return sorted(str(path.relative_to(top)) for path in top.rglob("*"))


def test_every_kind_of_inode_goes_and_what_links_lead_to_stays(tmp_path: Path) -> None:
    outside, top = tmp_path / "outside", tmp_path / "top"
    (outside / "d").mkdir(parents=True)
    (outside / "file").write_text("x")
    (top / "a/b").mkdir(parents=True)
    (top / "a/unreadable").mkdir(mode=0)
    os.link(outside / "file", top / "a/linked")
    (top / "to-directory").symlink_to(outside)
    (top / "a/dangling").symlink_to("nowhere")
    (top / os.fsdecode(b"\xff\n")).touch()
    os.mkfifo(top / "fifo")
    os.mknod(top / "a/whiteout", stat.S_IFCHR, os.makedev(0, 0))
    assert erase_at(str(top)) is None
    assert not top.exists()
    assert everything(outside) == ["d", "file"]
    # what is gone, a file, and a link by itself
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(outside)
    for name in ("top", "file", "link"):
        assert erase_at(str(tmp_path / name)) is None
    assert os.listdir(tmp_path) == ["outside"]


def test_ten_thousand_levels_and_paths_longer_than_a_path_can_be(tmp_path: Path) -> None:
    with in_memory(tmp_path / "fs") as fs:
        top = fs / "top"
        top.mkdir()
        os.close(deepen(top, DEEP))
        (top / "long").mkdir()
        os.close(deepen(top / "long", 100, "n" * 255))
        before = open_descriptors()
        assert erase_at(str(top)) is None
        assert not top.exists()
        assert open_descriptors() == before


def test_a_bind_mount_inside_stays_with_all_behind_it_and_the_rest_goes(
    tmp_path: Path, mounts: list[str]
) -> None:
    """The same file system, so the same device number; over a directory, over a file, nested."""
    host, top = tmp_path / "host", tmp_path / "top"
    (host / "home").mkdir(parents=True)
    (host / "home/file").write_text("precious")
    (top / "a/b/home").mkdir(parents=True)
    (top / "a/c").mkdir()
    (top / "a/c/file").touch()
    (top / "resolv.conf").touch()
    for source, target in (("home", "a/b/home"), ("home/file", "resolv.conf")):
        syscalls.mount(str(host / source), str(top / target), "", syscalls.MS_BIND)
        mounts.append(str(top / target))
    left = erase_at(str(top))
    assert left is not None
    assert (left.errno, left.names) in {(errno.EXDEV, 2), (errno.EBUSY, 2)}
    assert "something is mounted there" in str(left.error())
    assert everything(host) == ["home", "home/file"]
    assert (host / "home/file").read_text() == "precious"
    assert everything(top) == ["a", "a/b", "a/b/home", "a/b/home/file", "resolv.conf"]
    while mounts:
        syscalls.umount2(mounts.pop())
    assert erase_at(str(top)) is None
    assert everything(host) == ["home", "home/file"]


def test_what_is_mounted_on_the_tree_itself_stays(tmp_path: Path, mounts: list[str]) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host/file").touch()
    (tmp_path / "top").mkdir()
    syscalls.mount(str(tmp_path / "host"), str(tmp_path / "top"), "", syscalls.MS_BIND)
    mounts.append(str(tmp_path / "top"))
    left = erase_at(str(tmp_path / "top"))
    assert left is not None
    assert left.path == str(tmp_path / "top")
    assert (tmp_path / "host/file").exists()


@pytest.mark.root
def test_immutable_files_stay_are_told_and_go_when_they_can(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "a").mkdir(parents=True)
    (top / "b").mkdir()
    for name in ("a/log", "a/other", "b/file"):
        (top / name).touch()
    if subprocess.run(["chattr", "+i", top / "a/log"], check=False, capture_output=True).returncode:
        pytest.skip("this file system has no immutable files")
    try:
        left = erase_at(str(top))
        assert left is not None
        assert (left.path, left.errno) == (f"{top}/a/log", errno.EPERM)
        assert "chattr -i" in str(left.error())
        assert everything(top) == ["a", "a/log"]
    finally:
        subprocess.run(["chattr", "-i", top / "a/log"], check=True)
    assert erase_at(str(top)) is None


def test_of_a_file_system_that_is_read_only_one_name_is_tried(
    tmp_path: Path, mounts: list[str]
) -> None:
    (tmp_path / "fs").mkdir()
    syscalls.mount("tmpfs", str(tmp_path / "fs"), "tmpfs", 0, "size=1m")
    mounts.append(str(tmp_path / "fs"))
    (tmp_path / "fs/top").mkdir()
    for number in range(50):
        (tmp_path / f"fs/top/{number}").touch()
    syscalls.mount("", str(tmp_path / "fs"), "", syscalls.MS_REMOUNT | syscalls.MS_RDONLY)
    left = erase_at(str(tmp_path / "fs/top"))
    assert left is not None
    assert (left.errno, left.names) == (errno.EROFS, 1)


@pytest.mark.btrfs
def test_subvolumes_go_with_those_in_them_and_nothing_behind_a_mount(
    on_btrfs: Path, mounts: list[str]
) -> None:
    host, top = on_btrfs / "host", on_btrfs / "top"
    contents.make_subvolume(str(host))
    contents.make_subvolume(str(host / "snapshot"))
    (host / "snapshot/file").write_text("precious")
    contents.make_subvolume(str(top))
    inner = top
    # nested deeper than a name each can be looked up by in one call
    for name in ("a", "b", "c"):
        (inner / "dir").mkdir()
        inner = inner / "dir" / name
        contents.make_subvolume(str(inner))
        (inner / "file").touch()
        contents.freeze(str(inner), False)
    contents.freeze(str(inner), True)
    # a mount that hides a subvolume of the same name as one of the host's
    (top / "home").mkdir()
    contents.make_subvolume(str(top / "home/snapshot"))
    syscalls.mount(str(host), str(top / "home"), "", syscalls.MS_BIND)
    mounts.append(str(top / "home"))
    left = erase_at(str(top))
    assert left is not None
    assert left.path == str(top / "home")
    assert (host / "snapshot/file").read_text() == "precious"
    assert os.path.ismount(top / "home")
    syscalls.umount2(mounts.pop())
    assert erase_at(str(top)) is None
    assert not top.exists()
    assert (host / "snapshot/file").read_text() == "precious"


def test_a_name_that_went_meanwhile_is_no_failure(tmp_path: Path) -> None:
    parent = os.open(tmp_path, os.O_RDONLY)
    assert erase(parent, b"gone", "gone") is None
    os.close(parent)
