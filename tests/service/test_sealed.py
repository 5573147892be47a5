"""Layers that are sealed, counted, and given out read-only because somebody asked for that."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from aufsd_client import Client, errors
from tests.archives import tar
from tests.daemon import Daemon

pytestmark = pytest.mark.service


@pytest.fixture
def served(each_backend: Daemon) -> Daemon:
    """A daemon of each backend, with `top` on `base`."""
    with each_backend.client() as client:
        client.create("base")
        client.apply_diff("base", tar({"gone": b"g", "kept": b"k" * 5000}))
        client.create("top", parent="base")
        client.apply_diff("top", tar({"d": None, "d/f": b"x" * 70_000, ".wh.gone": b""}))
    return each_backend


def write(path: str) -> None:
    Path(path, "new").write_text("new")


def row(client: Client, id: str) -> tuple[bool, float]:
    (found,) = client.list(prefix=id).layers
    return found.sealed, found.created


# --- seal -------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["base", "top"])
def test_a_sealed_layer_is_given_out_read_only_and_takes_nothing(
    served: Daemon, client: Client, id: str
) -> None:
    before = client.usage(id)
    assert client.seal(id) == before
    assert client.get_metadata(id).metadata["sealed"] == "true"
    with pytest.raises(errors.LayerSealed):
        client.apply_diff(id, tar({"more": b""}))
    got = client.get(id)
    assert got.read_only
    with pytest.raises(OSError, match="Read-only"):
        write(got.path)
    client.put(id)
    assert [one.path for one in client.iter_changes("top")] == ["/d", "/d/f", "/gone"]


def test_a_seal_is_known_after_a_crash_and_asked_again_changes_nothing(
    served: Daemon, client: Client
) -> None:
    sealed, made = client.seal("top"), row(client, "top")[1]
    served.kill()
    served.start()
    with served.client() as again:
        assert row(again, "top") == (True, made)
        assert row(again, "base")[0] is False
        assert again.seal("top") == sealed == again.usage("top")
        assert again.get("top").read_only
        again.put("top")
        with pytest.raises(errors.LayerSealed):
            again.apply_diff("top", tar({"more": b""}))
        assert again.check(deep=True).problems == []


def test_who_uses_a_layer_keeps_it_from_being_sealed(client: Client) -> None:
    write(client.get("top").path)
    with pytest.raises(errors.LayerInUse) as refused:
        client.seal("top")
    assert refused.value.data["references"] == 1
    client.put("top")
    client.seal("top")
    assert any(one.path == "/new" for one in client.iter_changes("top"))


def test_layers_stand_on_a_sealed_one_and_are_not_sealed_themselves(client: Client) -> None:
    client.seal("top")
    client.create("child", parent="top")
    assert row(client, "child")[0] is False
    path = client.get("child").path
    assert sorted(os.listdir(path)) == ["d", "kept"]
    write(path)
    client.put("child")
    client.apply_diff("child", tar({"more": b""}))
    # counted anew, and not what its parent was counted to
    assert client.seal("child").inodes <= 4


def test_a_sealed_layer_is_removed_and_another_of_its_id_is_open(client: Client) -> None:
    client.seal("top")
    assert client.remove("top").removed
    client.create("top", parent="base")
    assert row(client, "top")[0] is False
    client.apply_diff("top", tar({"more": b""}))


def test_a_sealed_layer_is_converted_and_counted_anew(served: Daemon, client: Client) -> None:
    if client.version().backend == "btrfs":
        pytest.skip("no dialects there")
    client.seal("top")
    metadata = client.get_metadata("top").metadata
    os.setxattr(metadata["content"], "trusted.aufsd.usage", b"1 1 top")
    assert client.usage("top").size == 1
    client.convert("top", "aufs" if metadata["dialect"] == "overlay" else "overlay")
    assert client.usage("top").inodes == 4
    assert row(client, "top")[0]


# --- usage ------------------------------------------------------------------------------------


def test_usage_is_what_du_says_of_what_the_layer_changed(served: Daemon, client: Client) -> None:
    subprocess.run(["sync", "-f", served.root], check=True)
    found = client.usage("top")
    content = client.get_metadata("top").metadata["content"]
    own = [content, f"{content}/d", f"{content}/d/f"]
    if client.version().backend == "btrfs":
        # the file that was deleted takes up nothing there
        assert found.inodes == 3
    else:
        assert found.inodes == 4
        own += [one.path for one in os.scandir(content) if "gone" in one.name]
    assert found.size == sum(os.lstat(path).st_blocks * 512 for path in own)


def test_a_layer_that_is_mounted_is_counted_too_and_an_inode_once(client: Client) -> None:
    before = client.usage("top")
    path = client.get("top").path
    write(path)
    os.link(f"{path}/new", f"{path}/link")
    assert client.usage("top").inodes == before.inodes + 1


# --- read-only --------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["base", "top"])
def test_whoever_asks_for_read_only_gets_that_and_nobody_the_other(
    served: Daemon, client: Client, id: str
) -> None:
    if id == "base":
        client.remove("top")
    got = client.get(id, read_only=True)
    assert got.read_only
    with pytest.raises(OSError, match="Read-only"):
        write(got.path)
    with pytest.raises(errors.ModeConflict, match="read-only"):
        client.get(id)
    assert client.get(id, read_only=True, name="second").references == 2
    served.kill()
    served.start()
    with served.client() as again:
        with pytest.raises(errors.ModeConflict):
            again.get(id)
        again.put(id)
        assert again.put(id, name="second").references == 0
        write(again.get(id).path)
        with pytest.raises(errors.ModeConflict, match="writable"):
            again.get(id, read_only=True)
        assert again.put(id).references == 0
        assert again.check(deep=True).problems == []


def test_what_is_read_only_for_everybody_is_no_conflict(client: Client) -> None:
    """`base` has a child: it is given out read-only, asked for or not."""
    client.get("base")
    assert client.get("base", read_only=True).references == 2
    client.put("base")
    client.put("base")
    client.get("base", read_only=True)
    assert client.get("base").references == 2


# --- list -------------------------------------------------------------------------------------


def test_list_says_when_a_layer_was_made_and_takes_a_prefix(served: Daemon, client: Client) -> None:
    assert abs(row(client, "base")[1] - time.time()) < 3600
    for id in ("ab-1", "ab-2", "ac-1"):
        client.create(id)
    assert [one.id for one in client.iter_layers(prefix="ab-")] == ["ab-1", "ab-2"]
    page = client.list(prefix="ab-", limit=1)
    assert (len(page.layers), page.next) == (1, "ab-1")
    assert client.list(prefix="ab-", limit=1, after="ab-1").next == ""
    made = {one.id: one.created for one in client.iter_layers()}
    client.get("ab-1")
    client.put("ab-1")
    client.apply_diff("ab-1", tar({"f": b""}))
    served.stop()
    served.start()
    with served.client() as again:
        assert {one.id: one.created for one in again.iter_layers()} == made
        assert float(again.get_metadata("ab-1").metadata["created"]) == pytest.approx(made["ab-1"])
