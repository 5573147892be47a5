"""The walk that everything uses: any depth, any width, few descriptors, one mount."""

import errno
import os
import tracemalloc
from pathlib import Path

import pytest

from aufsd.kernel import beneath, syscalls
from aufsd.store.walk import OPEN_AT_MOST, Descent, Names, walk
from tests.trees import DEEP, deepen, in_memory, open_descriptors

DIRECTORY = beneath.DIRECTORY


def directories(top: Path) -> list[str]:
    found = []
    fd = os.open(top, DIRECTORY)
    for here in walk(fd):
        found.append(here.path())
        with os.scandir(here.fd) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir(follow_symlinks=False):
                    here.later(entry.name)
    os.close(fd)
    return found


def test_every_directory_is_met_once_parents_first_in_the_order_said(tmp_path: Path) -> None:
    for path in ("b/y", "b/x", "a/z/w", "c"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "a/file").touch()
    (tmp_path / "link").symlink_to("b")
    assert directories(tmp_path) == ["/", "/a", "/a/z", "/a/z/w", "/b", "/b/x", "/b/y", "/c"]


@pytest.mark.mounts
def test_ten_thousand_levels_with_a_branch_on_each(tmp_path: Path) -> None:
    with in_memory(tmp_path / "top") as top:
        os.close(deepen(top))
        here = os.open(top, DIRECTORY)
        for _ in range(DEEP):
            os.mkdir("z", dir_fd=here)
            below = os.open("d", DIRECTORY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
        fd, before, most, met = os.open(top, DIRECTORY), open_descriptors(), 0, 0
        for place in walk(fd):
            met += 1
            if place.depth % 1000 == 0:
                most = max(most, open_descriptors() - before)
            for name in os.listdir(place.fd):
                place.later(name)
        assert met == 1 + 2 * DEEP
        assert most <= OPEN_AT_MOST + 2
        assert open_descriptors() == before
        os.close(fd)


def test_a_hundred_thousand_names_take_their_bytes_and_little_more() -> None:
    names = Names()
    tracemalloc.start()
    try:
        for number in range(100_000):
            names.add(b"name-%d" % number)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3_000_000
    assert next(names) == b"name-0"
    names.add(b"last")
    assert list(names)[-2:] == [b"name-99999", b"last"]


@pytest.mark.mounts
def test_nothing_is_entered_that_is_mounted_on_also_of_the_same_file_system(
    tmp_path: Path,
) -> None:
    (tmp_path / "top/mounted").mkdir(parents=True)
    (tmp_path / "top/plain").mkdir()
    (tmp_path / "elsewhere/inside").mkdir(parents=True)
    mounted = str(tmp_path / "top/mounted")
    syscalls.mount(str(tmp_path / "elsewhere"), mounted, "", syscalls.MS_BIND)
    try:
        assert directories(tmp_path / "top") == ["/", "/plain"]
    finally:
        syscalls.umount2(mounted)


def test_who_moves_directories_leads_nowhere_else(tmp_path: Path) -> None:
    """The way back goes to the nearest directory that is still in its place, never by `..`."""
    deep = "/".join(["d"] * 40)
    (tmp_path / "top" / deep).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    fd = os.open(tmp_path / "top", DIRECTORY)
    with Descent(fd) as here:
        for _ in range(40):
            here.down(b"d")
        # the tenth level and all below it go elsewhere; the descriptors of the last few are open
        (tmp_path / "top" / "/".join(["d"] * 10)).rename(tmp_path / "outside/moved")
        depths = []
        while here.depth:
            here.up()
            depths.append(here.depth)
        assert depths[:OPEN_AT_MOST] == [39 - level for level in range(OPEN_AT_MOST)]
        assert os.fstat(here.fd).st_ino == os.fstat(fd).st_ino
        # never the directory outside, which `..` of the moved one is now
        assert 9 in depths
        assert os.listdir(tmp_path / "outside") == ["moved"]
    os.close(fd)


def test_a_descent_goes_on_where_the_way_back_is_gone(tmp_path: Path) -> None:
    (tmp_path / "/".join(["d"] * 40)).mkdir(parents=True)
    fd = os.open(tmp_path, DIRECTORY)
    with Descent(fd) as here:
        for _ in range(40):
            here.down(b"d")
        (tmp_path / "d/d/d").rename(tmp_path / "away")
        (tmp_path / "d/d/d").mkdir()
        while here.depth > 2:
            here.up()
        assert here.depth == 2
        assert os.listdir(here.fd) == ["d"]
        here.up()
        assert os.fstat(here.fd).st_ino == (tmp_path / "d").stat().st_ino
    os.close(fd)


@pytest.mark.parametrize("component_by_component", [False, True])
def test_opening_beneath_goes_through_no_link_and_never_above(
    tmp_path: Path, component_by_component: bool
) -> None:
    (tmp_path / "top/a/b").mkdir(parents=True)
    (tmp_path / "top/link").symlink_to("a")
    (tmp_path / "top/a/file").write_text("x")
    top = os.open(tmp_path / "top", DIRECTORY)

    def opened(path: str, flags: int = DIRECTORY) -> int:
        if component_by_component:
            return beneath.open_by_components(top, path, flags)
        return beneath.open_beneath(top, path, flags)

    os.close(opened("a/b"))
    os.close(opened("a/file", os.O_RDONLY))
    for path, reasons in (
        ("link/b", {errno.ELOOP, errno.ENOTDIR}),
        ("link", {errno.ELOOP, errno.ENOTDIR}),
        ("../top/a", {errno.EXDEV}),
        ("/etc", {errno.EXDEV}),
        ("a/missing", {errno.ENOENT}),
    ):
        before = open_descriptors()
        with pytest.raises(OSError) as refused:  # noqa: PT011  (the number is looked at)
            opened(path)
        assert refused.value.errno in reasons, path
        assert open_descriptors() == before
    os.close(top)
