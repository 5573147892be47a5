"""The daemon over fuse-overlayfs: a process serves each mount, and outlives the daemon."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd.kernel import mountinfo
from aufsd_client import Client
from aufsd_client.errors import ArchiveEscape, LayerDamaged
from tests.archive import tars
from tests.archives import tar
from tests.daemon import Daemon, daemon, eventually

pytestmark = [pytest.mark.service, pytest.mark.fuse]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that serves by fuse-overlayfs."""
    with daemon(tmp_path, "--backend", "fuse-overlayfs") as made:
        yield made


@pytest.fixture
def mounted(served: Daemon, client: Client) -> Path:
    """`top` on `base`, mounted with two references."""
    client.create("base")
    client.apply_diff("base", tar({"kept": b"base", "gone": b"base"}))
    client.create("top", parent="base")
    client.get("top")
    return Path(client.get("top").path)


def helper_of(served: Daemon, id: str) -> int:
    """The process that serves a mount, by its command line and descriptors alone."""
    target = str(served.root / "diff" / id)
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if b"fuse-overlayfs" in words and f"upperdir={target},".encode() in words:
                found.append(int(name))
    (pid,) = found
    return pid


def kill_and_wait(pid: int, client: Client) -> None:
    """kill -9 of a helper; returns when the daemon knows."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: client.health().status != "ok")


def test_a_killed_helper_is_told_and_the_next_get_mounts_with_no_reference_lost(
    mounted: Path, served: Daemon, client: Client
) -> None:
    (mounted / "kept").write_text("changed")
    client.diff_size("top")  # it is written out
    kill_and_wait(helper_of(served, "top"), client)
    (check,) = [check for check in client.health().checks if check.status != "ok"]
    assert (check.name, check.status) == ("helpers", "degraded")
    assert "top" in check.detail
    with pytest.raises(OSError, match="not connected"):
        os.listdir(mounted)
    got = client.get("top")
    assert (got.path, got.references, got.mounted) == (str(mounted), 3, True)
    assert (mounted / "kept").read_text() == "changed"
    assert client.health().status == "ok"
    for left in (2, 1, 0):
        assert client.put("top").references == left
    assert served.mounts() == []


def test_a_dead_mount_is_put_and_removed_like_any_other(
    mounted: Path, served: Daemon, client: Client
) -> None:
    kill_and_wait(helper_of(served, "top"), client)
    client.put("top")
    assert client.put("top").mounted is False
    assert served.mounts() == []
    assert client.remove("top").removed
    assert client.health().status == "ok"


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_mounts_and_counts_survive_the_daemon(mounted: Path, served: Daemon, how: str) -> None:
    pid = helper_of(served, "top")
    getattr(served, how)()
    assert (mounted / "kept").read_text() == "base"
    served.start()
    with served.client() as client:
        assert helper_of(served, "top") == pid
        assert client.get("top").references == 3
        # the new daemon looks after the helper that the last one started
        kill_and_wait(pid, client)
        assert client.get("top").references == 4
        assert (mounted / "kept").read_text() == "base"


def test_a_helper_that_died_while_nobody_served(mounted: Path, served: Daemon) -> None:
    pid = helper_of(served, "top")
    served.kill()
    os.kill(pid, signal.SIGKILL)
    served.start()
    with served.client() as client:
        got = client.get("top")
        assert (got.references, got.mounted) == (3, True)
        assert (mounted / "kept").read_text() == "base"


def test_the_layers_are_aufs_layers_whatever_serves_them_next(
    mounted: Path, served: Daemon, client: Client, tmp_path: Path
) -> None:
    (mounted / "gone").unlink()
    (mounted / "kept").write_text("new")
    client.put("top")
    client.put("top")
    names = {os.fspath(path.name) for path in (served.root / "diff/top").iterdir()}
    assert names == {".wh.gone", "kept"}
    changes = [(change.path, change.kind) for change in client.iter_changes("top")]
    assert changes == [("/gone", "delete"), ("/kept", "modify")]
    client.diff("top", str(tmp_path / "fuse.tar"))
    served.stop()
    served.flags = ("--backend", "overlay")
    served.start()
    with served.client() as again:
        got = again.get("top")
        assert [row.fstype for row in mountinfo.mounted_under(got.path)] == ["overlay"]
        assert sorted(os.listdir(got.path)) == ["kept"]
        again.put("top")
        again.diff("top", str(tmp_path / "overlay.tar"))
    assert (tmp_path / "fuse.tar").read_bytes() == (tmp_path / "overlay.tar").read_bytes()


def test_what_is_written_through_a_live_mount_is_in_the_diff(
    mounted: Path, client: Client, tmp_path: Path
) -> None:
    """The kernel keeps written pages for itself for a while."""
    (mounted / "new").write_bytes(b"x" * 300_000)
    client.diff("top", str(tmp_path / "tar"))
    listed = subprocess.run(
        ["tar", "-xOf", str(tmp_path / "tar"), "new"], capture_output=True, check=True
    )
    assert listed.stdout == b"x" * 300_000


@pytest.mark.parametrize("layer", ["base", "top"])
def test_a_device_that_the_helper_takes_for_a_whiteout_is_refused(
    client: Client, layer: str
) -> None:
    """It would be there for `diff`, and not for who looks into the mount."""
    client.create("base")
    client.create("top", parent="base")
    archive = tars.tar(tars.entry("d", type=tars.CHARACTER, devmajor=0, devminor=0))
    with pytest.raises(ArchiveEscape, match="deleted file"):
        client.apply_diff(layer, archive)
    client.apply_diff(layer, tars.tar(tars.entry("d", type=tars.CHARACTER, devmajor=1)))
    assert os.listdir(client.get("top").path) == ["d"]


def test_ordinary_work_in_a_mount_is_no_problem_to_a_deep_check(
    mounted: Path, served: Daemon, client: Client
) -> None:
    """The helper notes for itself, as overlayfs does, what it says in aufs's way beside it."""
    (mounted / "new").mkdir()
    (mounted / "kept").unlink()
    (mounted / "kept").mkdir()
    assert client.check("top", deep=True).problems == []
    # what nothing says beside it is of another dialect all the same
    stray = served.root / "diff/top/stray"
    stray.mkdir()
    os.setxattr(stray, "trusted.overlay.opaque", b"y")
    (problem,) = client.check("top", deep=True).problems
    assert (problem.problem, "/stray" in problem.detail) == ("mixed-dialects", True)


@pytest.mark.parametrize("kind", ["symlink", "directory"])
def test_what_users_can_name_as_the_mark_of_an_opaque_root_is_told_and_hides_nothing(
    mounted: Path, served: Daemon, client: Client, kind: str
) -> None:
    """The helper lets a symlink of that name be made, and takes it for the mark when it starts."""
    mark = served.root / "diff/top/.wh..wh..opq"
    if kind == "symlink":
        (mounted / mark.name).symlink_to(mark.name)
    client.put("top")
    assert client.put("top").mounted is False
    if kind == "directory":
        mark.mkdir()
    with pytest.raises(LayerDamaged, match=r"\.wh\.\.wh\.\.opq in it is no regular file"):
        client.get("top")
    client.create("child", parent="top")
    with pytest.raises(LayerDamaged, match="layer top is damaged"):
        client.get("child")
    assert "opaque-no-file" in {each.problem for each in client.check("top", deep=True).problems}
    mark.unlink() if kind == "symlink" else mark.rmdir()
    with client.mounted("top") as path:
        assert "kept" in os.listdir(path)


def test_a_device_that_is_a_whiteout_to_the_helper_is_told_as_such(
    mounted: Path, served: Daemon, client: Client
) -> None:
    os.mknod(mounted / "made", 0o20644, os.makedev(0, 0))
    (problem,) = client.check("top", deep=True).problems
    assert problem.problem == "whiteout-device"
    assert problem.detail.startswith("/made is a device 0:0")
