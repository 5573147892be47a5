"""The daemon on aufs and a full disk: hard links that were written through one name are kept.

The flush itself is tested in tests/conformance/test_aufs_full.py.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd_client import Client, errors
from tests.daemon import Daemon, daemon
from tests.small import full, small

pytestmark = [pytest.mark.service, pytest.mark.aufs]

NAMES = [f"name{number:02}" for number in range(20)]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon over a new store on a small file system."""
    with small(tmp_path / "disk") as disk, daemon(tmp_path, root=disk / "store") as made:
        yield made


@pytest.fixture
def written(client: Client) -> str:
    """The path of `top`, mounted, in which one of 21 names of a file of its parent was written."""
    assert client.version().backend == "aufs"
    client.create("base")
    with client.mounted("base") as path:
        Path(path, "first").write_text("old")
        for name in NAMES:
            os.link(f"{path}/first", f"{path}/{name}")
    client.create("top", parent="base")
    path = client.get("top").path
    Path(path, "first").write_text("new")
    return path


def contents(path: str) -> set[str]:
    return {Path(path, name).read_text() for name in ("first", *NAMES)}


def test_a_put_on_a_full_disk_loses_no_hard_link(
    served: Daemon, client: Client, written: str
) -> None:
    with full(served.root):
        with pytest.raises(errors.NoSpace, match="20 hard links") as caught:
            client.put("top")
        assert (caught.value.data["errno"], caught.value.data["count"]) == ("ENOSPC", 20)
        assert [(row.references, row.mounted) for row in client.mounts().mounts] == [(0, True)]
        (check,) = [each for each in client.health().checks if each.name == "mounts"]
        assert "top (ENOSPC)" in check.detail
        assert [(row.id, row.errno) for row in client.cleanup().failed] == [("top", "ENOSPC")]
        # the other names cannot even be read now: aufs links each at its first read
        assert Path(written, "first").read_text() == "new"
    assert contents(written) == {"new"}
    assert not client.put("top").mounted
    with client.mounted("top") as path:
        assert contents(path) == {"new"}


def test_a_restart_after_that_loses_none_either(
    served: Daemon, client: Client, written: str
) -> None:
    with full(served.root):
        with pytest.raises(errors.NoSpace):
            client.put("top")
        served.kill()
    served.start()
    with served.client() as again:
        assert not again.put("top").mounted
        with again.mounted("top") as path:
            assert contents(path) == {"new"}


def test_nothing_old_is_exported_and_no_child_shows_it(
    served: Daemon, client: Client, written: str
) -> None:
    client.create("child", parent="top")
    with full(served.root):
        with pytest.raises(errors.NoSpace):
            client.diff("top", bytearray())
        with pytest.raises(errors.NoSpace):
            client.changes("top")
        with pytest.raises(errors.NoSpace):
            client.get("child")
    with client.mounted("child") as path:
        assert contents(path) == {"new"}


def test_a_mounted_layer_can_be_removed_from_a_full_disk(
    served: Daemon, client: Client, written: str
) -> None:
    with full(served.root, but=1):  # what a removed layer is moved to
        assert client.remove("top", force=True).removed
        assert served.mounts() == []
