"""Checkpoint and roll back of snapshots: the layer stays where it is, under whoever uses it."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd.archive.relabel import XATTR
from aufsd.kernel import btrfs
from aufsd.store.content import limit_of
from aufsd_client import Client, errors
from tests.archives import tar
from tests.daemon import Daemon, daemon

pytestmark = [pytest.mark.service, pytest.mark.btrfs]
LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


@pytest.fixture
def served(tmp_path: Path, on_btrfs: Path) -> Iterator[Daemon]:
    """A daemon over a store on btrfs, with `top` on `base`."""
    with daemon(tmp_path, root=on_btrfs / "store") as made:
        with made.client() as client:
            client.create("base")
            client.apply_diff("base", tar({"gone": b"g", "kept": b"k" * 5000, "d": None}))
            client.create("top", parent="base")
        yield made


def changed(client: Client, id: str) -> list[tuple[str | None, str]]:
    return [(each.path, each.kind) for each in client.changes(id).changes]


def read_only(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return btrfs.is_read_only(fd)
    finally:
        os.close(fd)


def test_a_checkpoint_is_made_under_those_who_write(served: Daemon, client: Client) -> None:
    path = client.get("top").path
    Path(path, "gone").unlink()
    with Path(path, "log").open("w+b", buffering=0) as log:
        log.write(b"1" * 4096)
        with mmap.mmap(log.fileno(), 4096) as mapped:
            done = client.checkpoint("top", "first")
            assert (done.parent, done.live, done.references) == ("first", True, 1)
            log.write(b"2")
            mapped[:1] = b"m"
    assert Path(path, "log").read_bytes() == b"m" + b"1" * 4095 + b"2"
    first = client.get("first")
    assert first.read_only
    assert Path(first.path, "log").read_bytes() == b"1" * 4096
    assert read_only(first.path)
    with pytest.raises(OSError, match="Read-only"):
        Path(first.path, "new").touch()
    assert changed(client, "first") == [("/gone", "delete"), ("/log", "add")]
    assert changed(client, "top") == [("/log", "modify")]
    assert client.check(deep=True).problems == []


def test_only_what_came_after_the_checkpoint_is_looked_at(served: Daemon, client: Client) -> None:
    path = client.get("top").path
    for name in ("a", "b"):
        Path(path, name).write_text(name)
        client.checkpoint("top", name)
        assert changed(client, "top") == []
    Path(path, "c").write_text("c")
    os.chmod(path, 0o711)
    assert changed(client, "top") == [("/", "modify"), ("/c", "add")]
    assert changed(client, "b") == [("/b", "add")]


def test_a_base_layer_in_use_is_frozen_below_itself(served: Daemon, client: Client) -> None:
    client.create("alone")
    path = client.get("alone").path
    Path(path, "f").write_text("f")
    assert client.checkpoint("alone", "below").references == 1
    assert client.get_metadata("alone").metadata["path"] == path
    assert client.get_metadata("alone").metadata["parents"] == "below"
    client.rollback("alone")
    assert Path(path, "f").read_text() == "f"


def test_a_layer_that_is_given_out_read_only_stays_so(served: Daemon, client: Client) -> None:
    path = client.get("top", read_only=True).path
    client.checkpoint("top", "first")
    assert read_only(path)
    client.rollback("top", to="base")
    assert read_only(path)
    assert client.check(deep=True).problems == []


def test_what_is_open_is_not_rolled_back(served: Daemon, client: Client) -> None:
    path = client.get("top").path
    with Path(path, "f").open("w") as held:
        with pytest.raises(errors.UnmountBusy) as refused:
            client.rollback("top")
        holders = refused.value.data["holders"]
        assert isinstance(holders, list)
        assert os.getpid() in [each["pid"] for each in holders]
        held.write("kept")
    assert Path(path, "f").read_text() == "kept"
    assert client.rollback("top").discarded
    assert sorted(os.listdir(path)) == ["d", "gone", "kept"]
    assert client.rollback("top").discarded is False


def test_a_roll_back_keeps_the_label_and_the_limit(served: Daemon, client: Client) -> None:
    client.create("limited", parent="base", mount_label=LABEL, storage_opt={"size": "64M"})
    path = client.get("limited").path
    Path(path, "f").write_text("f")
    for to in ("base", ""):
        client.rollback("limited", to=to)
        assert not Path(path, "f").exists()
        for each in (Path(path), Path(path, "kept")):
            assert os.getxattr(each, XATTR) == LABEL.encode()
        assert limit_of(path, "trusted") == 64 << 20
        assert client.get("limited").references > 1
