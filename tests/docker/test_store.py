"""A store that Docker's driver wrote: every layer shows what it must, and is told right.

On aufs a mounted layer shows what aufs shows; on overlay, and in all that is read from the
branches, the strict view, which differs where directories were deleted and made again twice.
"""

import os
from collections.abc import Iterator

import pytest

from aufsd_client import Client
from tests.daemon import daemon
from tests.docker import store
from tests.docker.store import LAYERS, ORDERED, Record, View

pytestmark = [pytest.mark.service, pytest.mark.mounts]

each_layer = pytest.mark.parametrize("id", ORDERED, ids=store.label)


def shown(client: Client, id: str) -> View:
    with client.mounted(id) as path:
        return store.seen(path)


def test_every_layer_is_there_with_its_parents(client: Client) -> None:
    found = {row.id: (row.parent, row.depth) for row in client.iter_layers()}
    assert found == {
        id: ((*row["parents"], "")[0], len(row["parents"]) + 1) for id, row in LAYERS.items()
    }


@each_layer
def test_the_mounted_view_is_that_of_the_record(client: Client, backend: str, id: str) -> None:
    assert shown(client, id) == store.expected(id, strict=backend != "aufs")


@each_layer
def test_changes_are_what_really_changed(client: Client, id: str) -> None:
    found = [(os.fsencode(change.path), change.kind) for change in client.iter_changes(id)]
    parents = LAYERS[id]["parents"]
    before = store.expected(parents[0], strict=True) if parents else {}
    after = store.expected(id, strict=True)
    assert found == sorted(really_changed(before, after), key=lambda row: row[0].split(b"/"))


def really_changed(before: View, after: View) -> Iterator[tuple[bytes, str]]:
    """api.md's rules, applied to two whole views, whatever the layers say."""
    touched = set()
    for path in (before.keys() ^ after.keys()) - {"."}:
        above = parent(path)
        # what goes away with a deleted directory is not listed itself; nor what a file replaced
        if path in after or (above in after and after[above]["type"] == "dir"):
            yield listed(path), "add" if path in after else "delete"
            while above != ".":
                touched.add(above)
                above = parent(above)
    if not before:
        return
    for path in before.keys() & after.keys():
        if differs(before[path], after[path]) or path in touched:
            yield listed(path), "modify"


def parent(path: str) -> str:
    return path.rpartition("/")[0] or "."


def listed(path: str) -> bytes:
    return b"/" if path == "." else b"/" + path.encode("utf-8", "surrogateescape")


def differs(before: Record, after: Record) -> bool:
    # the time of a directory follows what it holds; a hard link more or less changes nothing
    passed = {"hardlink", "hardlink_b64"} | ({"mtime"} if after["type"] == "dir" else set())
    return without(before, passed) != without(after, passed)


def without(record: Record, keys: set[str]) -> Record:
    return {key: value for key, value in record.items() if key not in keys}


@pytest.fixture(scope="module")
def copied(
    client: Client, backend: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """A new store, made by the diff of every layer of Docker's one after the other."""
    directory = tmp_path_factory.mktemp("copied")
    with daemon(directory, "--backend", backend) as made, made.client() as other:
        for id in ORDERED:
            stream = bytearray()
            client.diff(id, stream)
            other.create(id, parent=(*LAYERS[id]["parents"], "")[0])
            other.apply_diff(id, bytes(stream))
        yield other


@each_layer
def test_the_diffs_make_a_store_of_the_same_views(copied: Client, backend: str, id: str) -> None:
    assert shown(copied, id) == store.expected(id, strict=backend != "aufs")
