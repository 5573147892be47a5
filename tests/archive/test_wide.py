"""Very many names in one directory and in one archive: what a job takes of memory for each of them
is little more than the name."""

import os
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from glob import glob
from pathlib import Path

import pytest
import trio

from aufsd.archive import headers
from aufsd.archive.requests import Limits
from aufsd.store.dialect import Dialect
from tests.archive.shelf import Shelf, open_shelf
from tests.trees import in_memory

pytestmark = pytest.mark.mounts

FEW, MANY = 20_000, 100_000
# bytes of resident memory: lists and sets of the names took 130 to 1,000
EACH = 110


@pytest.fixture
async def wide(tmp_path: Path) -> AsyncIterator[Shelf]:
    with in_memory(tmp_path / "memory") as memory:
        async with open_shelf(memory, limits=Limits(depth=0)) as made:
            yield made


def archive(count: int, prefix: bytes) -> bytes:
    """So many entries of one directory, in an order that is none."""
    names = (b"%bname-%d" % (prefix, number * 7919 % count) for number in range(count))
    return b"".join(rows_of(names, headers.REGULAR)) + bytes(1024)


def rows_of(names: Iterable[bytes], kind: bytes) -> Iterator[bytes]:
    for name in names:
        yield headers.encode(name, kind, mode=0o755, uid=0, gid=0)


async def peak(shelf: Shelf, work: Callable[[], Awaitable[object]]) -> int:
    """The most that the process of a job had while it did the work, in bytes.

    0 if it was over before anybody looked.
    """
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            for job in list(shelf.jobs.jobs.values()):
                with suppress(OSError, ValueError):
                    text = Path(f"/proc/{job.pid}/status").read_text()
                    # one that has ended says nothing
                    for line in re.findall(r"VmHWM:\s+(\d+) kB", text):
                        most = max(most, int(line) * 1024)
            await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await work()
        nursery.cancel_scope.cancel()
    return most


async def peaks(shelf: Shelf, count: int) -> dict[str, int]:
    """Of each job over a layer of so many files, the peak."""
    files, gone = archive(count, b"d/"), archive(count, b"d/.wh.")
    base, top = f"base{count}", f"top{count}"
    for id in (base, top):
        shelf.add(id)
    found = {}

    async def measure(what: str, work: Callable[[], Awaitable[object]]) -> None:
        found[what] = await peak(shelf, work)

    jobs = shelf.jobs
    await measure("apply", lambda: shelf.apply(files, base))
    await measure("whiteouts", lambda: shelf.apply(gone, top, base))
    own, both = shelf.chain(base), shelf.chain(top, base)
    with tempfile.TemporaryFile() as out:
        await measure("diff", lambda: jobs.diff(own, out.fileno()))
    with tempfile.TemporaryFile() as out:
        await measure("merged diff", lambda: jobs.diff(own, out.fileno(), against=()))
    await measure("changes", lambda: jobs.changes(both, against=own, limit=100))
    await measure("added", lambda: jobs.changes(own, against=(), limit=100))
    await measure("size", lambda: jobs.diff_size(both, against=own))
    await measure("usage", lambda: jobs.usage(own))
    await measure("fingerprint", lambda: jobs.fingerprint(own[0]))
    await measure("marks", lambda: jobs.look_into(both))
    await measure("merge", lambda: shelf.merge(files, top, base))
    await measure("convert", lambda: jobs.convert(base, Dialect.OVERLAY, ()))
    return found


async def test_what_a_job_takes_for_a_name_is_little_more_than_the_name(wide: Shelf) -> None:
    few, many = await peaks(wide, FEW), await peaks(wide, MANY)
    assert all(many.values())
    each = {what: (many[what] - few[what]) / (MANY - FEW) for what in few if few[what]}
    assert {what: most for what, most in each.items() if most > EACH} == {}


async def test_whiteouts_in_more_directories_than_are_kept_in_mind(wide: Shelf) -> None:
    """Those stay that hide something, and no others; all directories keep their times."""
    count = 66_000
    at, below = wide.add("a", Dialect.OVERLAY), wide.add("p")
    for name in ("7", "8/opaque/d"):
        (below / name).mkdir(parents=True)
    names = [b"%d" % number for number in range(count)]
    names += [b"8/opaque", b"8/opaque/d"]
    stream = b"".join(rows_of((name + b"/" for name in names), headers.DIRECTORY))
    marks = [name + b"/.wh.x" for name in names] + [b"8/opaque/.wh..wh..opq"]
    stream += b"".join(rows_of(marks, headers.REGULAR)) + bytes(1024)
    await wide.apply(stream, "a", "p")
    found = sorted(
        os.path.relpath(path, at)
        for path in glob(f"{at}/**/x", recursive=True, include_hidden=True)
    )
    assert found == ["7/x", "8/x"]
    assert {(at / name).stat().st_mtime for name in ("7", "8", "65999", "8/opaque")} == {0}
