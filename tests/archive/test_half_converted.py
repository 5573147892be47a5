"""A layer whose conversion was cut off is read as what it was, until it is finished."""

import os

import pytest

from aufsd.store import dialect as marks
from aufsd.store.dialect import WITH_MARKS, Dialect
from tests.archive.converting import build, convert_until
from tests.archive.shelf import NAMESPACE, Shelf, snapshot

pytestmark = pytest.mark.mounts


@pytest.mark.parametrize("source", WITH_MARKS)
async def test_every_job_reads_it_right(shelf: Shelf, source: Dialect) -> None:
    target = next(dialect for dialect in WITH_MARKS if dialect is not source)
    below = shelf.add("base")
    for name in ("gone", "stays"):
        (below / name).touch()
    (below / "opaque").mkdir()
    (below / "opaque" / "hidden").touch()
    build(shelf.add("whole", source), source)
    stream = await shelf.diff("whole")
    changes = await shelf.jobs.changes(shelf.chain("whole"), against=shelf.chain("base"))
    halves = 0
    for lines in range(30, 1000, 30):
        id = f"half{lines}"
        at = shelf.add(id, source)
        build(at, source)
        convert_until(at, target, lines)
        if marks.interrupted(at, NAMESPACE) is None:
            continue
        if marks.read_dialect(at, NAMESPACE) is target:
            # all is done but for taking the mark away: it is read, and copied, as what it is now
            assert await shelf.diff(id) == stream, lines
            continue
        halves += 1
        assert await shelf.diff(id) == stream, lines
        assert await shelf.diff(id, against=("base",)) == await shelf.diff(
            "whole", against=("base",)
        )
        assert await shelf.jobs.changes(shelf.chain(id), against=shelf.chain("base")) == changes
        assert await shelf.jobs.diff_size(shelf.chain(id)) == 8
        copy = f"{shelf.layout.staging}/{id}"
        os.mkdir(copy)
        await shelf.jobs.clone(id, copy)
        assert snapshot(copy) == snapshot(shelf.path("whole"))
        assert marks.interrupted(copy, NAMESPACE) is None
        assert marks.read_dialect(copy, NAMESPACE) is source
        # the copy shares inodes with the layer, which still has to be finished
        assert await shelf.jobs.convert(id, target)
        assert await shelf.diff(id) == stream, lines
    assert halves > 5
