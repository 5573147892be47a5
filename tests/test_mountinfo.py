"""What is mounted: the parser on the kernel's own words, and on names that it has to escape."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aufsd.kernel import mountinfo, syscalls
from aufsd.kernel.mountinfo import Mount


def test_the_line_of_proc_5() -> None:
    text = (
        b"36 35 98:1 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n"
    )
    assert list(mountinfo.parse(text)) == [
        Mount(
            id=36,
            parent=35,
            device=os.makedev(98, 1),
            root="/mnt1",
            mount_point="/mnt2",
            options=("rw", "noatime"),
            fstype="ext3",
            source="/dev/root",
            super_options="rw,errors=continue",
        )
    ]


def test_no_tags_and_a_dash_in_a_name() -> None:
    text = b"1 0 0:1 / /a\\040-\\040b ro - tmpfs - rw\n"
    (row,) = mountinfo.parse(text)
    assert (row.mount_point, row.source, row.options) == ("/a - b", "-", ("ro",))


def escaped(name: bytes) -> bytes:
    # mangle() in fs/proc_namespace.c
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes((byte,)) for byte in name)


@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_any_name_comes_back(name: bytes) -> None:
    line = b"1 0 0:1 / /" + escaped(name) + b" rw shared:1 - aufs none rw,si=1\n"
    (row,) = mountinfo.parse(line)
    assert os.fsencode(row.mount_point) == b"/" + name


@pytest.mark.parametrize("line", [b"36 35 98:0 /", b"1 0 0:1 / / rw shared:1", b"x", b""])
def test_what_is_not_mountinfo_is_an_error(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a line of mountinfo"):
        list(mountinfo.parse(line + b"\n"))


@pytest.mark.mounts
@pytest.mark.parametrize(
    "name", ["plain", "sp ace", "new\nline", "back\\slash", "#", "\udcff\r", "ü"]
)
def test_a_real_mount_is_found_under_its_name(name: str, tmp_path: Path) -> None:
    outside = tmp_path / f"{name}-beside"
    target = tmp_path / name / "inner"
    target.mkdir(parents=True)
    outside.mkdir()
    assert not mountinfo.is_mount_point(str(target))
    for path in (target, outside):
        syscalls.mount("none", str(path), "tmpfs", syscalls.MS_RDONLY)
    try:
        assert mountinfo.is_mount_point(str(target))
        (row,) = mountinfo.mounted_under(str(tmp_path / name))
        assert (row.mount_point, row.fstype) == (str(target), "tmpfs")
        assert "ro" in row.options
        assert row.device == os.lstat(target).st_dev
        assert mountinfo.mounted_under(str(target)) == [row]
    finally:
        for path in (target, outside):
            syscalls.umount2(str(path))
    assert mountinfo.mounted_under(str(tmp_path)) == []


@pytest.mark.mounts
def test_a_thousand_mounts_are_read_whole(tmp_path: Path) -> None:
    """Several pages of it, which the kernel gives one at a time."""
    names = [f"mount-{n}-{'x' * 100}" for n in range(200)]
    for name in names:
        (tmp_path / name).mkdir()
        syscalls.mount("none", str(tmp_path / name), "tmpfs", 0)
    try:
        rows = mountinfo.mounted_under(str(tmp_path))
        assert sorted(os.path.basename(row.mount_point) for row in rows) == sorted(names)
    finally:
        for name in names:
            syscalls.umount2(str(tmp_path / name))


def test_nothing_there_is_not_a_mount_point(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        mountinfo.is_mount_point(str(tmp_path / "none"))


@pytest.mark.mounts
def test_a_symlink_to_a_mount_point_is_none(tmp_path: Path) -> None:
    os.symlink("/proc", tmp_path / "link")
    assert not mountinfo.is_mount_point(str(tmp_path / "link"))
