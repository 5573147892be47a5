"""What is recorded of a layer as it is made is what is found in it later; any change shows."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings

from aufsd.archive.fingerprint import differences
from aufsd.archive.fork import ForkServer
from aufsd.store.dialect import WITH_MARKS, Dialect
from aufsd_client.errors import ArchiveEscape, BadArchive
from tests.archive.shelf import Shelf, needs_root, open_shelf
from tests.archive.tars import directory, entry, link, symlink, tar
from tests.archive.test_any_archive import ARCHIVES, Entry

pytestmark = pytest.mark.mounts

NAMES = "names, owners, modes, times or attributes"
CONTENTS = "contents of files"


async def record(shelf: Shelf, id: str, stream: bytes, dialect: Dialect = Dialect.OVERLAY) -> str:
    """Unpack into a new layer; what is to be recorded of it."""
    os.utime(shelf.add(id, dialect), (0, 0))
    with tempfile.TemporaryFile() as file:
        file.write(stream)
        file.seek(0)
        packed = await shelf.jobs.apply_recorded(
            shelf.chain(id), str(shelf.path(id)), file.fileno(), digest=False
        )
    return packed.fingerprint


async def find(shelf: Shelf, id: str) -> str:
    return await shelf.jobs.fingerprint(shelf.chain(id)[0])


# runs of plain files go in fewer steps than others, and are not looked at again
PLAIN = [entry(f"d/{number}", b"x" * number, mode=0o644) for number in range(5)]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ARCHIVES)
@example([directory("d"), *PLAIN, link("d/z", "d/2"), link("a", "d/3"), entry("d/1", b"new")])
@example([directory("d"), *PLAIN, symlink("d/2", "x"), directory("d/3"), entry("d/3/y")])
@example([directory("d", mode=0o2775), *PLAIN, link("d/0a", "d/4")])
@example([*PLAIN, symlink("e", "d"), entry("e/9"), entry("e/3", b"again")])
@example([*PLAIN, directory(".wh..wh.plnk"), entry(".wh..wh.plnk/1.2"), link("p", "d/2")])
@example([directory("d"), *PLAIN, entry("d/.wh.gone"), entry("d/.wh..wh..opq"), entry(".wh.x")])
def test_any_layer_is_recorded_as_it_is_found_and_the_same_in_both_dialects(
    server: ForkServer, archive: list[Entry]
) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as root:
            async with open_shelf(Path(root), server) as shelf:
                recorded = set()
                for dialect in WITH_MARKS:
                    try:
                        recorded.add(await record(shelf, dialect, tar(*archive), dialect))
                    except (BadArchive, ArchiveEscape):
                        return
                    recorded.add(await find(shelf, dialect))
                assert len(recorded) == 1

    trio.run(run)


def flip(path: Path) -> None:
    """Change one bit, and give the file its times back."""
    found = path.stat()
    with path.open("r+b") as file:
        file.seek(found.st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def retarget(at: Path) -> None:
    (at / "s").unlink()
    (at / "s").symlink_to("t")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a small file": (lambda at: flip(at / "d/small"), CONTENTS),
    "a bit of a large file": (lambda at: flip(at / "large"), CONTENTS),
    "mode": (lambda at: (at / "d/small").chmod(0o600), NAMES),
    "mode of a directory": (lambda at: (at / "d").chmod(0o700), NAMES),
    "mode of the root": (lambda at: at.chmod(0o700), NAMES),
    "xattr": (lambda at: os.setxattr(at / "large", "user.x", b"1"), NAMES),
    "xattr of a directory": (lambda at: os.setxattr(at / "d", "user.x", b"1"), NAMES),
    "time": (lambda at: os.utime(at / "large", (7, 7)), NAMES),
    "size": (lambda at: os.truncate(at / "d/small", 3), f"{NAMES} and {CONTENTS}"),
    "a file gone": (lambda at: (at / "large").unlink(), f"{NAMES} and {CONTENTS}"),
    "a whiteout gone": (lambda at: (at / "gone").unlink(), NAMES),
    "a symlink": (retarget, NAMES),
    "two files changed places": (
        lambda at: [(at / a).rename(at / b) for a, b in (("a", "x"), ("b", "a"), ("x", "b"))],
        CONTENTS,
    ),
}
LAYER = tar(
    directory("d"),
    entry("d/small", b"small" * 10),
    entry("d/other"),
    entry(".wh.gone"),
    entry("large", bytes(range(256)) * 4096 + bytes(1 << 20) + b"end"),
    symlink("s", "large"),
    entry("a", b"a"),
    entry("b", b"b"),
)


@pytest.mark.parametrize(("change", "told"), CHANGES.values(), ids=CHANGES)
async def test_a_change_shows_and_of_what_kind_it_is(
    shelf: Shelf, change: Callable[[Path], object], told: str
) -> None:
    recorded = await record(shelf, "a", LAYER)
    assert differences(recorded, await find(shelf, "a")) == ""
    before = (shelf.path("a").stat(), (shelf.path("a") / "d").stat())
    change(shelf.path("a"))
    for path, found in zip((shelf.path("a"), shelf.path("a") / "d"), before, strict=True):
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert differences(recorded, await find(shelf, "a")) == told


@needs_root
async def test_an_owner_shows(shelf: Shelf) -> None:
    recorded = await record(shelf, "a", LAYER)
    os.lchown(shelf.path("a") / "s", 0, 7)
    assert differences(recorded, await find(shelf, "a")) == NAMES


@pytest.mark.parametrize("dialect", WITH_MARKS)
async def test_converted_there_and_back_it_is_the_same(shelf: Shelf, dialect: Dialect) -> None:
    archive = tar(directory("d"), entry("d/.wh..wh..opq"), entry("d/.wh.x"), entry(".wh.y"))
    recorded = await record(shelf, "a", archive, dialect)
    (other,) = set(WITH_MARKS) - {dialect}
    for to in (other, dialect):
        assert await shelf.jobs.convert("a", to)
        assert await find(shelf, "a") == recorded


async def test_holes_are_zeros_and_cost_nothing(shelf: Shelf) -> None:
    """A tar may say in a few bytes that a file has terabytes of them."""
    recorded = await record(shelf, "a", tar(entry("f", bytes(1 << 20) + b"x" + bytes(1 << 20))))
    path = shelf.path("a") / "f"
    assert path.stat().st_blocks * 512 < 1 << 20
    found = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert path.stat().st_blocks * 512 > 1 << 20
    assert await find(shelf, "a") == recorded
    os.truncate(path, 1 << 42)
    assert differences(recorded, await find(shelf, "a")) == NAMES


async def test_of_what_was_not_empty_before_nothing_is_recorded(shelf: Shelf) -> None:
    """It may have been damaged by then, and would count as right."""
    shelf.add("a", Dialect.OVERLAY)
    (shelf.path("a") / "old").write_bytes(b"x")
    with tempfile.TemporaryFile() as file:
        file.write(LAYER)
        file.seek(0)
        packed = await shelf.jobs.apply_recorded(
            shelf.chain("a"), str(shelf.path("a")), file.fileno(), digest=False
        )
    assert packed.fingerprint == ""


def test_a_record_that_another_version_made_says_nothing() -> None:
    assert differences("1 a b", "1 a c") == CONTENTS
    assert differences("2 a b", "1 a c") == ""
    assert differences("1 a", "1 a c") == ""
