"""A union of aufs whose writable branch is not whole yet: what is read of it, or over it, is.

The daemon's part; the flush itself is tested in tests/conformance/test_aufs.py.
"""

import os
from pathlib import Path

import pytest

from aufsd_client import Client
from tests.archives import tar
from tests.daemon import Daemon

pytestmark = [pytest.mark.service, pytest.mark.aufs]


@pytest.fixture(autouse=True)
def written(served: Daemon, client: Client) -> None:
    """A mounted layer in which one name of a hard-linked file of its parent was written."""
    assert client.version().backend == "aufs"
    client.create("base")
    with client.mounted("base") as path:
        Path(path, "a").write_text("old")
        os.link(f"{path}/a", f"{path}/b")
    client.create("written", parent="base")
    Path(client.get("written").path, "a").write_text("new")
    # the other name leads to the new file by what the kernel keeps in memory
    assert "b" not in os.listdir(served.root / "diff/written")


def contents(client: Client, id: str) -> dict[str, str]:
    with client.mounted(id) as path:
        return {name: Path(path, name).read_text() for name in os.listdir(path)}


def test_the_diff_of_a_mounted_layer_has_every_name(client: Client) -> None:
    stream = bytearray()
    client.diff("written", stream)
    client.create("copy", parent="base")
    client.apply_diff("copy", bytes(stream))
    assert contents(client, "copy") == {"a": "new", "b": "new"}


def test_a_child_of_a_mounted_layer_shows_every_name(client: Client) -> None:
    client.create("child", parent="written")
    assert contents(client, "child") == {"a": "new", "b": "new"}


def test_a_child_of_a_layer_that_is_mounted_writable_is_warned_of(client: Client) -> None:
    (warning,) = client.create("child", parent="written").warnings
    assert "aufs shows what was not looked at before" in warning
    client.put("written")
    assert client.create("other", parent="written").warnings == []


def test_a_difference_that_a_mounted_layer_takes_part_in_has_every_name(client: Client) -> None:
    client.create("child", parent="written")
    client.create("nothing")
    stream = bytearray()
    client.diff("child", stream, parent="nothing")
    client.create("copy")
    client.apply_diff("copy", bytes(stream))
    assert contents(client, "copy") == {"a": "new", "b": "new"}


def test_nothing_of_the_pseudo_links_is_told_or_left(served: Daemon, client: Client) -> None:
    assert [(change.path, change.kind) for change in client.iter_changes("written")] == [
        ("/a", "modify"),
        ("/b", "modify"),
    ]
    assert not client.put("written").mounted
    assert os.listdir(served.root / "diff/written/.wh..wh.plnk") == []


def test_a_capability_that_aufs_removed_by_half_is_none(served: Daemon, client: Client) -> None:
    """chown(2) drops it; aufs leaves an empty one, which reads as EINVAL on the branch too."""
    # CAP_NET_RAW in a version 2 capability (linux/capability.h)
    capability = bytes.fromhex("01000002" + "00200000" + "00" * 12)
    client.create("tool")
    with client.mounted("tool") as path:
        Path(path, "tool").touch()
        os.setxattr(f"{path}/tool", "security.capability", capability)
    client.create("changed", parent="tool")
    with client.mounted("changed") as path:
        os.chown(f"{path}/tool", 1, 1)
    branch = served.root / "diff/changed/tool"
    assert os.listxattr(branch) == ["security.capability"]
    assert [(row.path, row.kind) for row in client.iter_changes("changed")] == [("/tool", "modify")]
    assert client.check(deep=True).problems == []
    # a second archive into the layer copies what it has
    client.apply_diff("changed", tar({"added": b""}))
    stream = bytearray()
    client.diff("changed", stream)
    client.create("copy", parent="tool")
    client.apply_diff("copy", bytes(stream))
    with client.mounted("copy") as path:
        found = os.stat(f"{path}/tool")
        assert (found.st_uid, os.listxattr(f"{path}/tool")) == (1, [])
        assert sorted(os.listdir(path)) == ["added", "tool"]
