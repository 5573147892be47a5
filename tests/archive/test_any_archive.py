"""Archives made at random of everything that may be in one: the same layer in both dialects, or the
same refusal."""

import os
import tarfile
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aufsd.archive.fork import ForkServer
from aufsd.store.dialect import Dialect
from aufsd_client.errors import ArchiveEscape, BadArchive
from tests.archive.shelf import Shelf, open_shelf, snapshot
from tests.archive.tars import directory, entry, link, symlink, tar

pytestmark = pytest.mark.mounts

Entry = tuple[tarfile.TarInfo, bytes]

PARTS = st.sampled_from(
    ["a", "b", "c", "a", "b", ".wh.a", ".wh.b", ".wh..wh..opq", "..", ".", "", ".wh.", ".wh..wh.x"]
)
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
# mostly harmless ones, so that archives come to their end
NAMES = st.one_of(
    st.sampled_from(["a", "b", "c", "a/b", "a/c", "b/a", "a/b/c", "b/c/a", ".", "./"]),
    st.sampled_from([".wh.a", ".wh.b", "a/.wh.b", "a/.wh..wh..opq", "b/.wh..wh..opq", "a/b/.wh.c"]),
    st.sampled_from([".wh..wh.plnk/1.2", ".wh..wh.aufs", ".wh..wh..opq"]),
    PATHS,
)
MODES = st.sampled_from([0o755, 0o2775, 0o4711])
ENTRIES = st.one_of(
    st.builds(
        lambda name, size, mode: entry(name, b"x" * size, mode=mode),
        NAMES,
        st.sampled_from([0, 5, 600]),
        MODES,
    ),
    st.builds(lambda name, mode: directory(name, mode=mode), NAMES, MODES),
    st.builds(symlink, NAMES, st.sampled_from(["a", "b", "../a", "/b", ".", "..", "/"])),
    st.builds(link, NAMES, st.one_of(NAMES, st.sampled_from(["a", "b", ".wh..wh.plnk/1.2"]))),
    st.builds(lambda name: entry(name, type=tarfile.FIFOTYPE), NAMES),
)
ARCHIVES = st.lists(ENTRIES, max_size=10)


async def outcome(shelf: Shelf, id: str, dialect: Dialect, archives: list[list[Entry]]) -> object:
    """The layer as a tar, or the error; after each archive the promises are held against it."""
    os.utime(shelf.add(id, dialect), (0, 0))
    for archive in archives:
        try:
            result = await shelf.merge(tar(*archive), id)
        except (BadArchive, ArchiveEscape) as error:
            return type(error), error.data["entry"], error.data["offset"]
        assert result.size == await shelf.jobs.diff_size(shelf.chain(id))
        stream, packed = await shelf.pack(id)
        assert packed.warnings == []
    shelf.add(f"{id}-copy", dialect)
    again = await shelf.apply(stream, f"{id}-copy")
    assert again.warnings == []
    assert snapshot(shelf.path(f"{id}-copy")) == snapshot(shelf.path(id))
    return stream


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(ARCHIVES, min_size=1, max_size=3))
@example([[symlink("a", "b"), directory("b"), entry("a/b"), entry("b/.wh.b")], [directory("a")]])
@example([[entry("a/b/c")], [entry("a/.wh..wh..opq"), entry("a/b/d")], [symlink("a", ".")]])
def test_any_archives_make_the_same_layer_in_both_dialects(
    server: ForkServer, archives: list[list[Entry]]
) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as root:
            outside = Path(root, "outside")
            outside.mkdir()
            async with open_shelf(Path(root, "store"), server) as shelf:
                first, second = [
                    await outcome(shelf, str(dialect), dialect, archives)
                    for dialect in (Dialect.AUFS, Dialect.OVERLAY)
                ]
                assert first == second
            assert {path.name for path in Path(root).iterdir()} == {"outside", "store"}

    trio.run(run)
