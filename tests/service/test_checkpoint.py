"""Checkpoint and roll back through the daemon, on every backend."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from aufsd_client import Client, errors
from tests.archives import tar
from tests.backends import on_unions
from tests.daemon import Daemon

pytestmark = pytest.mark.service


@pytest.fixture
def served(each_backend: Daemon) -> Daemon:
    """A daemon of each backend, with `top` on `base`."""
    with each_backend.client() as client:
        client.create("base")
        files = {"gone": b"g", "kept": b"k" * 5000, "d": None, "d/old": b"o"}
        client.apply_diff("base", tar(files))
        client.create("top", parent="base")
    return each_backend


def view(path: str) -> dict[str, object]:
    """All that shows, to the attribute."""
    found: dict[str, object] = {}
    for each in [Path(path), *Path(path).rglob("*")]:
        info = each.lstat()
        body = each.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        time = info.st_mtime_ns
        found[str(each.relative_to(path))] = (info.st_mode, info.st_uid, info.st_gid, time, body)
    return found


def change(path: str) -> None:
    top = Path(path)
    (top / "gone").unlink()
    (top / "new").write_text("new")
    (top / "d/old").unlink()
    (top / "d").rmdir()
    (top / "d").mkdir(mode=0o700)
    (top / "d/fresh").write_text("fresh")
    # the time of a write may still change in the cache of a FUSE mount when it is unmounted
    os.utime(top / "d/fresh", (1, 1))
    os.utime(top / "new", (1, 1))
    os.link(top / "new", top / "link")
    os.setxattr(top / "new", "user.note", b"n")


def shown(client: Client, id: str) -> dict[str, object]:
    with client.mounted(id) as path:
        return view(path)


# --- checkpoint -------------------------------------------------------------------------------


@on_unions
def test_a_checkpoint_of_a_mounted_layer_keeps_path_references_and_view(
    served: Daemon, client: Client
) -> None:
    got = client.get("top")
    client.get("top", name="mine")
    change(got.path)
    before = view(got.path)
    done = client.checkpoint("top", "first")
    assert (done.parent, done.references, done.warnings) == ("first", 2, [])
    assert view(got.path) == before
    (row,) = client.mounts().mounts
    assert (row.path, row.references, row.mounted) == (got.path, 2, True)
    assert client.changes("top").changes == []
    assert [layer.parent for layer in client.list(prefix="top").layers] == ["first"]
    (first,) = client.list(prefix="first").layers
    assert (first.parent, first.sealed) == ("base", True)
    Path(got.path, "later").write_text("l")
    assert [each.path for each in client.changes("top").changes] == ["/later"]
    client.put("top")
    client.put("top", name="mine")
    assert "later" in shown(client, "top")
    assert shown(client, "first") == before
    assert client.check(deep=True).problems == []


def test_a_checkpoint_of_a_layer_that_is_not_mounted(served: Daemon, client: Client) -> None:
    client.apply_diff("top", tar({"a": b"a", ".wh.gone": b"", "d/.wh..wh..opq": b""}))
    before = shown(client, "top")
    created = client.list(prefix="top").layers[0].created
    assert client.checkpoint("top", "first").references == 0
    assert shown(client, "top") == before
    assert client.list(prefix="top").layers[0].created == created
    assert client.list(prefix="first").layers[0].created >= created
    assert [each.path for each in client.changes("first").changes] == [
        *("/a", "/d", "/d/old", "/gone"),
    ]


def test_a_base_layer_becomes_one_with_a_parent(served: Daemon, client: Client) -> None:
    client.create("alone")
    client.apply_diff("alone", tar({"f": b"f"}))
    client.checkpoint("alone", "below")
    assert Path(client.get("alone").path, "f").read_bytes() == b"f"
    assert client.get("below").read_only


def test_names_and_times_of_checkpoints_survive_a_restart(served: Daemon, client: Client) -> None:
    path = client.get("top").path
    for number in range(3):
        Path(path, "n").write_text(str(number))
        client.checkpoint("top", f"n{number}")
    before = {row.id: (row.created, row.sealed, row.parent) for row in client.list().layers}
    served.kill()
    served.start()
    with served.client() as again:
        after = {row.id: (row.created, row.sealed, row.parent) for row in again.list().layers}
        assert after == before
        assert (Path(path, "n").read_text(), again.get("top").references) == ("2", 2)


def test_a_checkpoint_may_be_the_parent_of_others(served: Daemon, client: Client) -> None:
    path = client.get("top").path
    Path(path, "f").write_text("one")
    client.checkpoint("top", "one")
    client.create("fork", parent="one")
    Path(path, "f").write_text("two")
    with client.mounted("fork") as other:
        assert Path(other, "f").read_text() == "one"
    assert Path(path, "f").read_text() == "two"


# --- rollback ---------------------------------------------------------------------------------


def test_a_roll_back_shows_what_the_checkpoint_held(served: Daemon, client: Client) -> None:
    path = client.get("top").path
    change(path)
    before = view(path)
    client.checkpoint("top", "first")
    (Path(path) / "d/fresh").unlink()
    (Path(path) / "gone").write_text("back")
    done = client.rollback("top")
    assert (done.parent, done.references, done.discarded) == ("first", 1, True)
    assert view(path) == before
    assert client.rollback("top").discarded is False


def test_a_roll_back_goes_to_any_layer(served: Daemon, client: Client) -> None:
    path = client.get("top").path
    seen = {}
    for number in range(4):
        Path(path, f"f{number}").write_text(str(number))
        client.checkpoint("top", f"n{number}")
        seen[f"n{number}"] = view(path)
    for name in ("n1", "n3", "n0", "base", "n2"):
        assert client.rollback("top", to=name).parent == name
        if name in seen:
            assert view(path) == seen[name]
    client.put("top")
    assert shown(client, "top") == seen["n2"]
    assert client.check(deep=True).problems == []


def test_what_was_thrown_away_is_deleted(served: Daemon, client: Client) -> None:
    path = client.get("top").path
    Path(path, "big").write_bytes(b"x" * 100_000)
    client.rollback("top")
    assert not any(path.name == "big" for path in (served.root / "diff").rglob("*"))


# --- refused ----------------------------------------------------------------------------------


@on_unions
def test_what_is_open_is_refused_and_stays_mounted(served: Daemon, client: Client) -> None:
    path = client.get("top").path
    Path(path, "f").write_text("f")
    with (Path(path) / "f").open() as held:
        for call in (lambda: client.rollback("top"), lambda: client.checkpoint("top", "no")):
            with pytest.raises(errors.UnmountBusy) as refused:
                call()
            holders = refused.value.data["holders"]
            assert isinstance(holders, list)
            assert os.getpid() in [each["pid"] for each in holders]
            assert held.read() in ("f", "")
        (row,) = client.mounts().mounts
        assert (row.references, row.mounted) == (1, True)
        assert client.exists("no").exists is False
    client.checkpoint("top", "yes")
    assert Path(path, "f").read_text() == "f"


@on_unions
def test_a_copy_in_another_namespace_keeps_a_layer_as_it_is(served: Daemon, client: Client) -> None:
    path = client.get("top").path
    Path(path, "f").write_text("f")
    script = f"mount --make-rprivate / && cd {path} && echo in && read wait"
    command = ["unshare", "-m", "sh", "-c", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(errors.UnmountBusy) as refused:
            client.checkpoint("top", "no")
        assert str(other.pid) in str(refused.value.data["holders"])
        assert client.exists("no").exists is False
        assert os.path.ismount(path)
        assert client.mounts().mounts[0].references == 1
        other.stdin.close()
    client.checkpoint("top", "yes")


@on_unions
def test_what_cannot_be_is_refused_with_nothing_done(served: Daemon, client: Client) -> None:
    def call(kind: type[errors.AufsdError], method: str, **params: object) -> errors.AufsdError:
        with pytest.raises(kind) as refused:
            client.call(method, {"id": "top", **params})
        return refused.value

    client.create("child", parent="base")
    client.create("mounted")
    client.get("mounted")
    before = client.list().layers
    call(errors.LayerNotFound, "checkpoint", id="nosuch", **{"as": "x"})
    call(errors.LayerExists, "checkpoint", **{"as": "base"})
    call(errors.InvalidLayerId, "checkpoint", **{"as": "no/id"})
    call(errors.InvalidParams, "checkpoint")
    error = call(errors.LayerHasChildren, "checkpoint", id="base", **{"as": "x"})
    assert "frozen already" in error.message
    assert error.data["children"] == ["child", "top"]
    error = call(errors.LayerInUse, "checkpoint", id="mounted", **{"as": "x"})
    assert "path" in error.message
    call(errors.LayerNotFound, "rollback", id="nosuch")
    call(errors.ParentNotFound, "rollback", to="nosuch")
    call(errors.InvalidParams, "rollback", to="top")
    call(errors.LayerHasChildren, "rollback", id="base")
    call(errors.LayerInUse, "rollback", id="mounted")
    assert client.list().layers == before
    client.checkpoint("top", "sealed")
    client.create("on", parent="sealed")
    call(errors.LayerSealed, "checkpoint", id="sealed", **{"as": "x"})
    call(errors.LayerSealed, "rollback", id="sealed")
    client.seal("top")
    call(errors.LayerSealed, "checkpoint", **{"as": "x"})
