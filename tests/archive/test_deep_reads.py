"""Layers deeper than paths and descriptors go: read, compared, measured and written as tars."""

import os
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from aufsd.archive.offline import open_offline
from aufsd.archive.requests import Limits, Settings
from aufsd.results import Change
from aufsd.store.dialect import WITH_MARKS, Dialect
from aufsd.store.erase import erase_at
from tests.archive.shelf import NAMESPACE, Shelf, open_shelf
from tests.archive.tars import entry, tar
from tests.trees import DEEP, deepen, in_memory

pytestmark = pytest.mark.mounts

# levels, and how long the names are: paths of 20 KB and of a megabyte
SHAPES = [pytest.param(DEEP, 1, id="deep"), pytest.param(4000, 255, id="long")]
# what a process has that nobody gave more, as most hosts are set up
DESCRIPTORS = 1024


@pytest.fixture
async def deep_shelf(tmp_path: Path) -> AsyncIterator[Shelf]:
    limits = Limits(depth=0, open_files=DESCRIPTORS)
    with in_memory(tmp_path / "memory") as memory:
        async with open_shelf(memory, limits=limits) as made:
            yield made


@pytest.fixture
def out() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_WRONLY)
    yield fd
    os.close(fd)


def fill(at: Path, levels: int, length: int, content: bytes) -> None:
    """A file in the innermost of so many directories."""
    here = deepen(at, levels, "d" * length)
    fd = os.open("f", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=here)
    os.write(fd, content)
    os.close(fd)
    os.utime("f", (1, 1), dir_fd=here)
    os.close(here)


@pytest.mark.parametrize(("levels", "length"), SHAPES)
async def test_a_deep_layer_is_measured_and_written(
    deep_shelf: Shelf, out: int, levels: int, length: int
) -> None:
    fill(deep_shelf.add("a"), levels, length, b"x")
    jobs, chain = deep_shelf.jobs, deep_shelf.chain("a")
    # the root and the file too
    assert (await jobs.diff(chain, out)).entries == levels + 2
    assert await jobs.diff_size(chain) == 1
    assert (await jobs.usage(chain)).inodes == levels + 2
    before = await jobs.fingerprint(chain[0])
    here = deep_shelf.path("a")
    os.chmod(here / ("d" * length), 0o700)
    assert await jobs.fingerprint(chain[0]) != before
    assert erase_at(str(here)) is None


@pytest.mark.parametrize(("levels", "length"), SHAPES)
async def test_two_deep_layers_are_compared(
    deep_shelf: Shelf, out: int, levels: int, length: int
) -> None:
    """They differ in the innermost file alone, so what is above it is told of by its name only."""
    fill(deep_shelf.add("p"), levels, length, b"old")
    fill(deep_shelf.add("a"), levels, length, b"newer")
    jobs, chain, below = deep_shelf.jobs, deep_shelf.chain("a", "p"), deep_shelf.chain("p")
    way = "/" + "/".join(["d" * length] * levels)
    assert (await jobs.diff(chain, out, against=below)).entries == levels + 2
    assert await jobs.diff_size(chain, against=below) == 5
    # the file and the root
    assert (await jobs.usage(chain, against=below)).inodes == 2
    changes = await jobs.changes(chain, against=below)
    assert changes.changes == [Change("modify", path=f"{way}/f")]
    # aufs cannot open names of 255 bytes
    assert {each.problem for each in await jobs.look_into(chain)} <= {"long-name"}


@pytest.mark.parametrize(("levels", "length"), SHAPES)
async def test_changes_of_a_deep_layer_come_a_page_at_a_time(
    deep_shelf: Shelf, levels: int, length: int
) -> None:
    fill(deep_shelf.add("a"), levels, length, b"x")
    chain = deep_shelf.chain("a")
    found: list[Change] = []
    after, pages = "", 0
    while len(found) < 20 and (after or not pages):
        page = await deep_shelf.jobs.changes(chain, against=(), after=after, limit=7)
        found += page.changes
        after, pages = page.next, pages + 1
    assert [change.path for change in found[:20]] == [
        "/" + "/".join(["d" * length] * depth) for depth in range(1, 21)
    ]


@pytest.mark.parametrize("dialect", WITH_MARKS)
async def test_a_deep_layer_goes_out_and_comes_in_again(
    deep_shelf: Shelf, dialect: Dialect
) -> None:
    fill(deep_shelf.add("a"), 1500, 2, b"x")
    stream = await deep_shelf.diff("a")
    deep_shelf.add("b", dialect)
    await deep_shelf.apply(stream, "b")
    assert await deep_shelf.diff("b") == stream
    assert await deep_shelf.diff("b", against=()) == stream


@pytest.mark.parametrize(("levels", "length"), SHAPES)
async def test_a_directory_that_is_implied_is_as_below_at_any_depth(
    deep_shelf: Shelf, levels: int, length: int
) -> None:
    fill(deep_shelf.add("p"), levels, length, b"old")
    below = deep_shelf.path("p") / ("d" * length)
    os.chmod(below, 0o2751)
    os.utime(below, (7, 7))
    at = deep_shelf.add("a")
    way = "/".join(["d" * length] * levels)
    await deep_shelf.apply(tar(entry(f"{way}/g", b"x"), entry(f"{way}/.wh.f")), "a", "p")
    found = (at / ("d" * length)).stat()
    assert (found.st_mode & 0o7777, found.st_mtime) == (0o2751, 7)
    chain = deep_shelf.chain("a", "p")
    changes = await deep_shelf.jobs.changes(chain, against=chain[1:])
    assert [change.kind for change in changes.changes[-1:]] == ["modify"]
    assert await deep_shelf.jobs.diff_size(chain, against=chain[1:]) == 1


@pytest.mark.parametrize(("levels", "length"), SHAPES)
def test_a_deep_store_is_exported_by_a_process_with_few_descriptors(
    tmp_path: Path, out: int, levels: int, length: int
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with in_memory(tmp_path / "memory") as memory:
        for id, parents in (("a", "p\n"), ("p", "")):
            (memory / "diff" / id).mkdir(parents=True)
            fill(memory / "diff" / id, levels, length, id.encode())
            (memory / "layers").mkdir(exist_ok=True)
            (memory / "layers" / id).write_text(parents)
        try:
            with open_offline(str(memory), Settings(namespace=NAMESPACE)) as store:
                resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, limits[1]))
                assert store.write_view("a", out) == []
                told = {each.problem for each in store.look_into(["a", "p"])}
                assert told <= {"long-name"}
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
