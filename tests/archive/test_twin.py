"""What snapshots have in common, from btrfs's own books: the same answers as entry by entry."""

import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from aufsd.archive import twin
from aufsd.store import content
from aufsd.store import dialect as marks
from aufsd.store.dialect import Dialect
from tests.archive.shelf import Shelf, open_shelf

pytestmark = [pytest.mark.service, pytest.mark.btrfs]


@pytest.fixture
async def shelf(on_btrfs: Path) -> AsyncIterator[Shelf]:
    """Directories of a store on btrfs."""
    async with open_shelf(on_btrfs) as made:
        yield made


def make(shelf: Shelf) -> tuple[Path, Path]:
    """A parent with content, and a child that was a snapshot of it a moment ago."""
    parent, child = shelf.path("parent"), shelf.path("child")
    content.make_subvolume(str(parent))
    for name, value in marks.xattrs(Dialect.NONE, "trusted").items():
        os.setxattr(parent, name, value)
    for number in range(6):
        for other in range(4):
            directory = parent / f"d{number}/e{other}"
            directory.mkdir(parents=True)
            for file in range(5):
                (directory / f"f{file}").write_text(f"{number}{other}{file}")
    os.link(parent / "d0/e0/f0", parent / "d5/e3/linked")
    content.snapshot(str(parent), str(child))
    content.note_origin(str(child), str(parent), "trusted")
    return parent, child


def found(child: Path, parent: Path) -> twin.Twin | None:
    now, then = os.open(child, os.O_RDONLY), os.open(parent, os.O_RDONLY)
    try:
        return twin.find(now, then, "trusted")
    finally:
        os.close(now)
        os.close(then)


async def answers(shelf: Shelf) -> tuple[list[tuple[str | None, str]], bytes, int]:
    """All that can be asked of the two."""
    chain, against = shelf.chain("child"), shelf.chain("parent")
    listed = await shelf.jobs.changes(chain, against=against)
    changes = [(str(change.path), str(change.kind)) for change in listed.changes]
    stream = await shelf.diff("child", against=("parent",))
    return [*changes], stream, await shelf.jobs.diff_size(chain, against=against)


async def same_without_books(shelf: Shelf) -> list[tuple[str | None, str]]:
    """The changes, after it was seen that a comparison of every entry gives the same."""
    child, parent = shelf.path("child"), shelf.path("parent")
    assert found(child, parent) is not None
    quick = await answers(shelf)
    os.removexattr(child, "trusted.aufsd.origin")
    assert found(child, parent) is None
    assert await answers(shelf) == quick
    return quick[0]


def mutate(top: Path, rng: random.Random) -> None:
    """One change of some kind, somewhere."""
    files = sorted(path for path in top.rglob("*") if path.is_file())
    directories = sorted(path for path in top.rglob("*") if path.is_dir())
    file, directory = rng.choice(files), rng.choice(directories)
    name = directory / f"new{rng.randrange(10**6)}"
    times = file.stat()

    def same_size_and_time() -> None:
        file.write_bytes(file.read_bytes()[::-1])
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    def move_directory() -> None:
        target = rng.choice(directories)
        if not target.is_relative_to(directory):
            directory.rename(target / name.name)

    def file_to_directory() -> None:
        file.unlink()
        file.mkdir()

    def directory_anew() -> None:
        shutil.rmtree(directory)
        directory.mkdir()

    kinds: tuple[Callable[[], object], ...] = (
        same_size_and_time,
        move_directory,
        file.unlink,
        name.touch,
        name.mkdir,
        lambda: file.write_text("changed"),
        lambda: file.rename(name),
        lambda: os.link(file, name),
        lambda: name.symlink_to("target"),
        lambda: file.chmod(0o600),
        lambda: os.setxattr(file, "user.x", b"y"),
        lambda: os.utime(file, (1, 1)),
        file_to_directory,
        directory_anew,
        lambda: os.chown(directory, 1, 1),
    )
    rng.choice(kinds)()


@pytest.mark.parametrize("seed", range(8))
async def test_random_changes_on_either_side(shelf: Shelf, seed: int) -> None:
    parent, child = make(shelf)
    rng = random.Random(seed)
    for _ in range(rng.randrange(12)):
        mutate(child, rng)
    # a parent that was in use when its child was made
    for _ in range(rng.randrange(4)):
        mutate(parent, rng)
    await same_without_books(shelf)


async def test_a_change_in_the_tick_of_the_snapshot_is_seen(shelf: Shelf) -> None:
    """Same size, same times, in the same tick of the clock: only the transaction tells."""
    parent, child = make(shelf)
    file = child / "d3/e2/f1"
    before = file.stat()
    file.write_bytes(b"xyz")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert found(child, parent) is not None
    assert await same_without_books(shelf) == [("/d3/e2/f1", "modify")]


async def test_both_names_of_a_hard_link_lead_to_it(shelf: Shelf) -> None:
    _, child = make(shelf)
    (child / "d0/e0/f0").write_text("changed")
    assert await same_without_books(shelf) == [("/d0/e0/f0", "modify"), ("/d5/e3/linked", "modify")]


async def test_what_was_not_touched_is_not_looked_at(shelf: Shelf) -> None:
    parent, child = make(shelf)
    (child / "d1/e1/f1").write_text("changed")
    known = found(child, parent)
    assert known is not None

    def below(name: str) -> bool:
        return known.same_below(os.lstat(child / name), os.lstat(parent / name))

    assert not known.same(os.lstat(child / "d1/e1/f1"), os.lstat(parent / "d1/e1/f1"))
    assert known.same(os.lstat(child / "d1/e1/f2"), os.lstat(parent / "d1/e1/f2"))
    assert [name for name in sorted(os.listdir(child)) if not below(name)] == ["d1"]
    assert [name for name in sorted(os.listdir(child / "d1")) if not below(f"d1/{name}")] == ["e1"]


async def test_a_layer_of_many_changes(shelf: Shelf) -> None:
    """More items than one answer of the kernel holds."""
    _, child = make(shelf)
    (child / "many").mkdir()
    for number in range(3000):
        (child / f"many/{number}").touch()
    changes = await same_without_books(shelf)
    assert len(changes) == 3001


async def test_subvolumes_inside_are_compared_entry_by_entry(shelf: Shelf) -> None:
    _, child = make(shelf)
    subprocess.run(
        ["btrfs", "subvolume", "create", str(child / "d2/e2/own")], check=True, capture_output=True
    )
    (child / "d2/e2/own/file").touch()
    child_first = await shelf.jobs.changes(shelf.chain("child"), against=shelf.chain("parent"))
    assert ("/d2/e2/own/file", "add") in [(row.path, row.kind) for row in child_first.changes]
    await same_without_books(shelf)


async def test_two_layers_that_are_no_snapshots_of_each_other(shelf: Shelf) -> None:
    parent, child = make(shelf)
    content.snapshot(str(parent), str(shelf.path("other")))
    assert found(child, shelf.path("other")) is None
    assert found(parent, child) is None
