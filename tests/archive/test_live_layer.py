"""A layer that is written to while it is read: never silence, never another file's content."""

import contextlib
import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd.archive.fork import ForkServer
from aufsd.archive.requests import Limits
from aufsd_client.errors import LimitExceeded
from tests.archive.shelf import Shelf, open_shelf
from tests.archive.tars import listing

pytestmark = pytest.mark.mounts


@contextlib.contextmanager
def churned(at: Path) -> Iterator[None]:
    """Files, directories and symlinks of few names, taking each other's place all the time."""
    stop = threading.Event()
    chance = random.Random(1)

    def churn() -> None:
        names = [at / f"{a}/{b}" for a in "abc" for b in "xyz"]
        while not stop.is_set():
            path = chance.choice([*names, at / "a", at / "b", at / "c"])
            with contextlib.suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            with contextlib.suppress(OSError):
                match chance.randrange(4):
                    case 0:
                        path.symlink_to("/etc/passwd")
                    case 1:
                        path.write_bytes(b"x" * chance.randrange(200_000))
                    case 2:
                        path.mkdir()
                    case _:
                        (path / "deep").mkdir(parents=True)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("against", [None, (), ("base",)])
async def test_what_goes_away_is_named(shelf: Shelf, against: tuple[str, ...] | None) -> None:
    base, at = shelf.add("base"), shelf.add("a")
    (base / "b").mkdir()
    (base / "b" / "below").write_bytes(b"y")
    (at / "still").write_bytes(b"there")
    with churned(at):
        for _ in range(15):
            stream, result = await shelf.pack("a", "base", against=against)
            members = listing(stream)
            assert "still" in [member.name for member in members]
            assert not [m for m in members if m.isreg() and b"root:" in m.name.encode()]
            assert b"root:x:0:0" not in stream
            for warning in result.warnings:
                assert warning.endswith(("went away while the layer was read", "zeros stand there"))
            await shelf.jobs.diff_size(shelf.chain("a", "base"), against=shelf.chain("base"))
            await shelf.jobs.diff_size(shelf.chain("a", "base"))
            await shelf.jobs.changes(shelf.chain("a", "base"), against=shelf.chain("base"))


async def test_a_file_that_shrinks_is_filled_up_and_named(shelf: Shelf) -> None:
    """The header has told its size already."""
    at = shelf.add("a")
    big = at / "big"
    big.write_bytes(b"x" * (8 << 20))
    (at / "z").write_bytes(b"after")
    r, w = os.pipe()
    got: list[bytes] = []

    def shrink_and_read() -> None:
        with open(r, "rb", buffering=0) as file:
            # so much that the file's header, which tells its size, has been read too
            while sum(map(len, got)) < 100_000:
                got.append(file.read(100_000))
            os.truncate(big, 4 << 20)
            while piece := file.read(1 << 20):
                got.append(piece)

    thread = threading.Thread(target=shrink_and_read)
    thread.start()
    result = await shelf.jobs.diff(shelf.chain("a"), w)
    os.close(w)
    thread.join()
    stream = b"".join(got)
    assert [warning.split()[:2] for warning in result.warnings] == [["big", "shrank"]]
    assert result.size == len(stream)
    members = listing(stream)
    assert [(m.name, m.size) for m in members] == [(".", 0), ("big", 8 << 20), ("z", 5)]


async def test_a_chain_longer_than_the_descriptors_go_is_an_error_and_not_a_stub(
    tmp_path: Path, server: ForkServer
) -> None:
    async with open_shelf(tmp_path, server, limits=Limits(open_files=40)) as shelf:
        ids = [f"layer{number}" for number in range(60)]
        for id in ids:
            (shelf.add(id) / "d").mkdir()
        with pytest.raises(LimitExceeded, match="chain is too long"):
            await shelf.jobs.changes(shelf.chain(*ids), against=shelf.chain(ids[-1]))
        # what needs only one of them
        assert await shelf.jobs.diff_size(shelf.chain(*ids)) == 0
