"""On a full disk every call that has to write says so, and what makes room goes on."""

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import pytest

from aufsd_client import Client, errors
from tests.archives import tar
from tests.daemon import Daemon, daemon
from tests.small import ext4_at, filled, full, small

pytestmark = [pytest.mark.service, pytest.mark.mounts]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon over a store on a small file system."""
    with (
        small(tmp_path / "disk") as disk,
        daemon(tmp_path, "--backend", "overlay", root=disk / "store") as made,
    ):
        yield made


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.create("new", parent="base"),
        lambda client: client.apply_diff("base", tar({"more": b"x"})),
        lambda client: client.apply_diff("empty", tar({"more": b"x"})),
        lambda client: client.convert("base", "aufs"),
        lambda client: client.checkpoint("top", "kept"),
        lambda client: client.seal("top"),
    ],
    ids=["create", "apply again", "apply", "convert", "checkpoint", "seal"],
)
def test_a_call_that_has_to_write_is_refused_or_done_and_no_incident(
    served: Daemon, client: Client, call: Callable[[Client], object]
) -> None:
    client.create("base")
    client.apply_diff("base", tar({"file": b"content"}))
    client.create("top", parent="base")
    client.create("empty")
    with full(served.root):
        # what needs no new name may be done; any other error fails the test
        with suppress(errors.NoSpace):
            call(client)
        assert client.remove("empty").removed
    assert client.check(deep=True).problems == []


def test_a_remove_that_has_no_room_for_its_mark_is_refused_and_done_later(
    served: Daemon, client: Client
) -> None:
    """Of a layer whose parents file somebody has deleted."""
    client.create("layer")
    (served.root / "layers/layer").unlink()
    with full(served.root), pytest.raises(errors.NoSpace):
        client.remove("layer")
    assert client.remove("layer").removed
    assert client.check().problems == []


@pytest.mark.ext4
@pytest.mark.parametrize("lacks", ["blocks", "inodes"])
@pytest.mark.parametrize("backend", ["overlay", pytest.param("aufs", marks=pytest.mark.aufs)])
def test_a_start_on_a_full_disk_serves_what_it_served_before(
    tmp_path: Path, backend: str, lacks: Literal["blocks", "inodes"]
) -> None:
    """moby#20272, moby#10915: what makes room has to be served first."""
    with (
        ext4_at(tmp_path) as disk,
        daemon(tmp_path, "--backend", backend, root=disk / "store") as served,
    ):
        with served.client() as client:
            client.create("base")
            client.apply_diff("base", tar({"file": b"content"}))
            for id in ("top", "victim"):
                client.create(id, parent="base")
            client.apply_diff("victim", tar({"large": b"x" * (1 << 20)}))
            with client.mounted("top") as path:
                assert Path(path, "file").read_bytes() == b"content"
        served.stop()
        with filled(disk) if lacks == "blocks" else no_inode(disk):
            served.start("--backend", "auto")
            with served.client() as client:
                assert client.status().backend == backend
                (check,) = [each for each in client.health().checks if each.name == "space"]
                assert check.status == "failing"
                # overlayfs falls back to read-only, or finds no room for its own directories
                with suppress(errors.NoSpace):
                    got = client.get("top")
                    assert Path(got.path, "file").read_bytes() == b"content"
                    assert got.read_only == is_read_only(Path(got.path, "file"))
                    client.put("top")
                with suppress(errors.NoSpace):
                    client.get("victim")
                    client.put("victim")
                assert client.remove("victim").removed
        assert "Traceback" not in served.log


def is_read_only(path: Path) -> bool:
    try:
        path.touch()
    except OSError as error:
        return error.errno == errno.EROFS
    return False


@contextmanager
def no_inode(disk: Path) -> Iterator[None]:
    """Inside, the file system has blocks, and no inode is left."""
    at = disk / "names"
    at.mkdir()
    with suppress(OSError):
        for number in itertools.count():
            (at / str(number)).touch()
    assert not os.statvfs(disk).f_ffree
    try:
        yield
    finally:
        shutil.rmtree(at)
