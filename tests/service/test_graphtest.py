"""graphtest, the suite that Docker and containers/storage run over every graph driver.

Sources: moby daemon/graphdriver/graphtest/graphtest_unix.go, containers/storage
drivers/graphtest/graphtest_unix.go (Echo).
"""

import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd_client import Client
from tests.daemon import Daemon, daemon

pytestmark = pytest.mark.service


@pytest.fixture(
    params=[
        "auto",
        pytest.param("fuse-overlayfs", marks=pytest.mark.fuse),
        pytest.param("btrfs", marks=pytest.mark.btrfs),
    ]
)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon over a new store, with each backend in turn."""
    name = str(request.param)
    root = request.getfixturevalue("on_btrfs") if name == "btrfs" else tmp_path
    with daemon(tmp_path, "--backend", name, root=root / "store") as made:
        yield made


def make_base(client: Client, id: str) -> None:
    """createBase: a directory and a file with odd modes and owners, and nothing else."""
    client.create(id)
    with client.mounted(id) as path:
        directory, file = Path(path, "a subdir"), Path(path, "a file")
        directory.mkdir()
        os.chown(directory, 1, 2)
        directory.chmod(0o705 | stat.S_ISVTX)
        file.write_bytes(b"Some data")
        file.chmod(0o222 | stat.S_ISUID)


def verify_base(client: Client, id: str) -> None:
    with client.mounted(id) as path:
        directory, file = Path(path, "a subdir").stat(), Path(path, "a file").stat()
        assert stat.S_IMODE(directory.st_mode) == 0o705 | stat.S_ISVTX
        assert (directory.st_uid, directory.st_gid) == (1, 2)
        assert stat.S_IMODE(file.st_mode) == 0o222 | stat.S_ISUID
        assert sorted(os.listdir(path)) == ["a file", "a subdir"]


def test_create_empty(client: Client) -> None:
    client.create("empty")
    assert client.exists("empty").exists
    with client.mounted("empty") as path:
        found = os.stat(path)
        assert stat.S_IMODE(found.st_mode) == 0o755
        assert (found.st_uid, found.st_gid) == (0, 0)
        assert os.listdir(path) == []


def test_create_base_and_snap(client: Client) -> None:
    make_base(client, "Base")
    verify_base(client, "Base")
    client.create("Snap", parent="Base")
    verify_base(client, "Snap")


def test_deep_layer_read(client: Client) -> None:
    client.create("Base")
    with client.mounted("Base") as path:
        Path(path, "testfile").write_text("base")
    last = "Base"
    for number in range(1, 129):
        id = f"layer{number}"
        client.create(id, parent=last)
        with client.mounted(id) as path:
            Path(path, "top-id").write_text(id)
            Path(path, f"layer-{number}").mkdir()
            Path(path, f"layer-{number}/layer-id").write_text(id)
            Path(path, f"layer-{number}/parent-id").write_text(last)
        last = id
    with client.mounted(last) as path:
        assert Path(path, "testfile").read_text() == "base"
        assert Path(path, "top-id").read_text() == last
        parent = "Base"
        for number in range(1, 129):
            assert Path(path, f"layer-{number}/layer-id").read_text() == f"layer{number}"
            assert Path(path, f"layer-{number}/parent-id").read_text() == parent
            parent = f"layer{number}"


def test_diff_apply(client: Client, tmp_path: Path) -> None:
    """A child rewrites 100 files and removes a file and a directory; so must a sibling show it."""
    rng = random.Random(1)
    client.create("Base")
    with client.mounted("Base") as path:
        for number in range(100):
            Path(path, f"file-{number}").write_bytes(rng.randbytes(64))
        Path(path, "var/lib/deep").mkdir(parents=True)
        Path(path, "var/lib/deep/f").write_text("x")
        Path(path, "var/gone").write_text("x")
    client.create("Upper", parent="Base")
    with client.mounted("Upper") as path:
        for number in range(100):
            Path(path, f"file-{number}").write_bytes(rng.randbytes(64))
        Path(path, "var/gone").unlink()
        Path(path, "var/lib/deep/f").unlink()
        Path(path, "var/lib/deep").rmdir()
        Path(path, "var/lib").rmdir()
    size = client.diff_size("Upper").size
    assert size == 100 * 64
    stream = tmp_path / "upper.tar"
    client.diff("Upper", str(stream))
    client.create("Diff", parent="Base")
    assert client.apply_diff("Diff", str(stream)).size == size
    with client.mounted("Diff") as diff, client.mounted("Upper") as upper:
        for number in range(100):
            name = f"file-{number}"
            assert Path(diff, name).read_bytes() == Path(upper, name).read_bytes()
        assert os.listdir(f"{diff}/var") == []


def test_changes(client: Client) -> None:
    """20 files modified, added and deleted by turns: exactly those, as what they are."""
    client.create("Base")
    with client.mounted("Base") as path:
        for number in range(20):
            Path(path, f"file-{number:02}").write_text("x")
    client.create("Upper", parent="Base")
    expected = []
    with client.mounted("Upper") as path:
        for number in range(0, 20, 2):
            name = f"file-{number:02}"
            if number % 4:
                Path(path, name).write_text("changed")
                expected.append((f"/{name}", "modify"))
            else:
                Path(path, name).unlink()
                expected.append((f"/{name}", "delete"))
            Path(path, f"new-{number:02}").write_text("x")
            expected.append((f"/new-{number:02}", "add"))
    found = [(change.path, change.kind) for change in client.iter_changes("Upper")]
    assert found == sorted(expected)


@pytest.mark.parametrize("same_layer", [False, True], ids=["two layers", "one layer"])
@pytest.mark.parametrize("depth", [1, 3, 10])
def test_echo(client: Client, depth: int, same_layer: bool) -> None:
    """A subtree deleted in one layer and made again in the next, or in the same one.

    A directory that was there is `modify` when it was made again, what it hides is `delete`.
    """
    directory = "/".join(f"d{level}" for level in range(depth))
    above = [f"/{'/'.join(f'd{level}' for level in range(upto))}" for upto in range(1, depth)]
    client.create("Base")
    with client.mounted("Base") as path:
        Path(path, directory).mkdir(parents=True)
        Path(path, directory, "file-1").write_text("base")
    client.create("Second", parent="Base")
    top = "Second"
    with client.mounted("Second") as path:
        Path(path, directory, "file-1").unlink()
        Path(path, directory).rmdir()
        if same_layer:
            Path(path, directory).mkdir()
            Path(path, directory, "file-2").write_text("again")
    changes = [(change.path, change.kind) for change in client.iter_changes("Second")]
    upper = [(name, "modify") for name in above]
    if same_layer:
        assert changes == [
            *upper,
            (f"/{directory}", "modify"),
            (f"/{directory}/file-1", "delete"),
            (f"/{directory}/file-2", "add"),
        ]
    else:
        assert changes == [*upper, (f"/{directory}", "delete")]
        top = "Third"
        client.create("Third", parent="Second")
        with client.mounted("Third") as path:
            Path(path, directory).mkdir()
            Path(path, directory, "file-2").write_text("again")
        changes = [(change.path, change.kind) for change in client.iter_changes("Third")]
        assert changes == [*upper, (f"/{directory}", "add"), (f"/{directory}/file-2", "add")]
    with client.mounted(top) as path:
        assert os.listdir(f"{path}/{directory}") == ["file-2"]


def test_list_layers(served: Daemon, client: Client) -> None:
    for id in ("b", "a", "c"):
        client.create(id)
    assert [row.id for row in client.iter_layers()] == ["a", "b", "c"]
    page = client.list(limit=2)
    assert ([row.id for row in page.layers], page.next) == (["a", "b"], "b")
    assert [row.id for row in client.list(after=page.next).layers] == ["c"]
