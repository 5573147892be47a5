"""Archives of trees deeper than paths, recursion and descriptors go, in and out."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aufsd.archive.requests import Limits
from aufsd.store.dialect import WITH_MARKS, Dialect
from aufsd_client.errors import LimitExceeded
from tests.archive.shelf import Shelf, open_shelf
from tests.archive.tars import directory, entry, tar
from tests.trees import DEEP, in_memory

pytestmark = pytest.mark.mounts

# levels, and how long the names are: paths of 20 KB and of a megabyte
SHAPES = [pytest.param(DEEP, 1, id="deep"), pytest.param(4000, 255, id="long")]


@pytest.fixture
async def deep_shelf(tmp_path: Path) -> AsyncIterator[Shelf]:
    """A shelf whose jobs may have few descriptors."""
    with in_memory(tmp_path / "memory") as memory:
        async with open_shelf(memory, limits=Limits(depth=0, open_files=64)) as made:
            yield made


def innermost(top: Path, levels: int, length: int) -> int:
    """A descriptor of the directory so many levels below; the caller closes it."""
    here = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(levels):
        below = os.open("d" * length, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    return here


@pytest.mark.parametrize("dialect", WITH_MARKS)
@pytest.mark.parametrize(("levels", "length"), SHAPES)
async def test_one_entry_implies_all_the_directories_above_it(
    deep_shelf: Shelf, levels: int, length: int, dialect: Dialect
) -> None:
    at = deep_shelf.add("a", dialect)
    way = "/".join(["d" * length] * levels)
    await deep_shelf.apply(tar(entry(f"{way}/f", b"x", mtime=5)), "a")
    here = innermost(at, levels, length)
    assert os.listdir(here) == ["f"]
    assert os.fstat(here).st_mtime == 5
    os.close(here)


@pytest.mark.parametrize("dialect", WITH_MARKS)
async def test_each_level_has_its_own_entry_whiteout_and_time(
    deep_shelf: Shelf, dialect: Dialect
) -> None:
    levels = 2000
    at = deep_shelf.add("a", dialect)
    rows = []
    for level in range(1, levels + 1):
        way = "/".join(["d"] * level)
        rows += [directory(way, mtime=level), entry(f"{way}/f"), entry(f"{way}/.wh.x")]
    await deep_shelf.apply(tar(*rows), "a")
    here = innermost(at, levels, 1)
    for level in range(levels, 0, -1):
        # nothing lies below: the whiteouts hide nothing
        assert set(os.listdir(here)) <= {"f", "d"}
        assert os.fstat(here).st_mtime == level
        above = os.open("..", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = above
    os.close(here)


async def test_more_directories_than_are_kept_in_mind_have_their_times_all_the_same(
    deep_shelf: Shelf,
) -> None:
    at = deep_shelf.add("a")
    wide = 70_000
    rows = [directory("d", mtime=1), directory("d/e", mtime=2)]
    rows += [directory(f"d/e/{number}", mtime=3) for number in range(wide)]
    # one that is not known any more, and the first ones once more
    rows += [entry("d/e/0/f"), entry("d/g"), entry("h/i", mtime=4)]
    await deep_shelf.apply(tar(*rows), "a")
    times = {name: (at / name).stat().st_mtime for name in ("d", "d/e", "d/e/0", "d/e/69999", "h")}
    assert times == {"d": 1, "d/e": 2, "d/e/0": 3, "d/e/69999": 3, "h": 4}


async def test_a_deeper_entry_than_the_limit_is_told(tmp_path: Path) -> None:
    async with open_shelf(tmp_path) as shelf:
        shelf.add("a")
        with pytest.raises(LimitExceeded, match="4096 directories deep"):
            await shelf.apply(tar(entry("d/" * 4097 + "f")), "a")
