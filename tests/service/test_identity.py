"""A store is who it was: what is mounted over it, or turned, is told, and not written to."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from aufsd.kernel import mountinfo, syscalls
from aufsd_client import Client, errors
from tests.archives import tar
from tests.daemon import daemon

pytestmark = pytest.mark.service


def tree(top: Path) -> list[str]:
    return sorted(str(path.relative_to(top)) for path in top.rglob("*"))


def store_check(client: Client) -> tuple[str, str]:
    health = client.health()
    (found,) = [check for check in health.checks if check.name == "store"]
    assert health.status == ("failing" if found.status == "failing" else health.status)
    return found.status, found.detail


CALLS: dict[str, Callable[[Client], object]] = {
    "create": lambda client: client.create("fresh"),
    "create on a parent": lambda client: client.create("fresh", parent="base"),
    "remove": lambda client: client.remove("spare"),
    "get of a union": lambda client: client.get("top"),
    "get of content": lambda client: client.get("alone"),
    "get of content that is held": lambda client: client.get("held"),
    "get of what others stand on": lambda client: client.get("base"),
    "diff": lambda client: client.diff("base", bytearray()),
    "apply_diff": lambda client: client.apply_diff("spare", tar({"new": b""})),
    "changes": lambda client: client.changes("top"),
    "diff_size": lambda client: client.diff_size("top"),
    "seal": lambda client: client.seal("spare"),
    "usage": lambda client: client.usage("spare"),
    "convert": lambda client: client.convert("spare", "aufs"),
    "check": lambda client: client.check(),
    "repair": lambda client: client.check(repair=True),
}


def filled(client: Client) -> None:
    client.create("base")
    client.apply_diff("base", tar({"below": b""}))
    client.create("top", parent="base")
    for id in ("alone", "spare", "held"):
        client.create(id)
    client.get("held")


def a_disk_over_the_root(root: Path) -> Path:
    """With a store of its own on it, as after a boot that mounted late."""
    syscalls.mount("none", str(root), "tmpfs", 0)
    for name in ("layers", "diff/base", "diff/theirs", "mnt", ".aufsd/removing"):
        (root / name).mkdir(parents=True)
    (root / "layers/base").touch()
    (root / ".aufsd/lock").touch()
    return root


def a_disk_over(name: str) -> Callable[[Path], Path]:
    def mount(root: Path) -> Path:
        syscalls.mount("none", str(root / name), "tmpfs", 0)
        (root / name / "theirs").mkdir()
        return root / name

    return mount


def itself_over_its_content(root: Path) -> Path:
    """Of the same file system: no device tells, and rename(2) does not cross it."""
    syscalls.mount(str(root / "diff"), str(root / "diff"), "", syscalls.MS_BIND)
    return root / "diff"


def a_symlink_for(name: str) -> Callable[[Path], Path]:
    def plant(root: Path) -> Path:
        (root / name).rename(root.parent / "moved")
        (root / name).symlink_to(root.parent / "moved")
        return root.parent / "moved"

    return plant


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(a_disk_over_the_root, id="a disk over the root"),
        pytest.param(a_disk_over("diff"), id="a disk over diff"),
        pytest.param(a_disk_over("layers"), id="a disk over layers"),
        pytest.param(a_disk_over("mnt"), id="a disk over mnt"),
        pytest.param(a_disk_over(".aufsd"), id="a disk over .aufsd"),
        pytest.param(a_disk_over(".aufsd/removing"), id="a disk over removing"),
        pytest.param(itself_over_its_content, id="diff over itself"),
        pytest.param(a_symlink_for("mnt"), id="mnt is a symlink"),
        pytest.param(a_symlink_for("diff"), id="diff is a symlink"),
        pytest.param(a_symlink_for("layers"), id="layers is a symlink"),
    ],
)
def test_a_store_that_another_took_the_place_of_is_told_and_left_alone(
    tmp_path: Path, change: Callable[[Path], Path]
) -> None:
    with daemon(tmp_path) as served, served.client() as client:
        filled(client)
        there = change(served.root)
        before = tree(there)
        for name, call in CALLS.items():
            with pytest.raises(errors.IncompatibleFilesystem, match="not what this daemon locked"):
                pytest.fail(f"{name}: {call(client)}")
        assert tree(there) == before
        status, detail = store_check(client)
        assert status == "failing"
        assert str(served.root) in detail
        assert any("not what this daemon locked" in each for each in client.status().degraded)
        assert "incident" not in served.log
        undone(served.root, there)
        assert store_check(client)[0] == "ok"
        client.check(repair=True)
        assert client.remove("spare").removed
        with client.mounted("top") as path:
            assert os.listdir(path) == ["below"]


def undone(root: Path, there: Path) -> None:
    if there.name == "moved":
        (link,) = [path for path in root.iterdir() if path.is_symlink()]
        link.unlink()
        there.rename(link)
    else:
        syscalls.umount2(str(there), syscalls.MNT_DETACH)


@pytest.mark.root
def test_a_file_system_that_turned_read_only_is_told_and_what_only_reads_goes_on(
    tmp_path: Path,
) -> None:
    """moby#18010: ext4 on Debian turns so by itself (errors=remount-ro) when the disk has an error.

    Since Linux 6.15 statvfs(2) does not say so any more.
    """
    image, root = tmp_path / "image", tmp_path / "store"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    root.mkdir()
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(root)], check=True)
    try:
        with daemon(tmp_path, "--backend", "overlay") as served, served.client() as client:
            filled(client)
            assert store_check(client) == ("ok", "it is what was locked, and takes writes")
            subprocess.run(["mount", "-o", "remount,abort", str(root)], check=True)
            for name in ("create", "remove", "get of content", "apply_diff", "convert", "repair"):
                with pytest.raises(errors.PermissionDenied, match="takes no writes"):
                    pytest.fail(f"{name}: {CALLS[name](client)}")
            assert "incident" not in served.log
            assert store_check(client)[0] == "failing"
            assert client.get("held").references == 2
            assert client.get("base").read_only
            assert client.put("base").mounted is False
            served.kill()
    finally:
        syscalls.umount2(str(root), syscalls.MNT_DETACH)


@pytest.mark.mounts
@pytest.mark.parametrize("at", ["mnt/top", "diff/top", "diff/base", "diff/alone"])
def test_a_symlink_in_the_store_leads_no_call_elsewhere(tmp_path: Path, at: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    with daemon(tmp_path) as served, served.client() as client:
        filled(client)
        (served.root / at).rename(tmp_path / "moved")
        (served.root / at).symlink_to(victim)
        before = tree(victim), os.listxattr(victim), victim.stat().st_mode
        id = "alone" if at == "diff/alone" else "top"
        with pytest.raises((errors.MountFailed, errors.LayerDamaged), match="no directory"):
            client.get(id)
        if at.startswith("diff"):
            damaged = os.path.basename(at)
            with pytest.raises(errors.LayerDamaged, match="no directory"):
                client.diff(damaged, bytearray())
            with pytest.raises((errors.LayerDamaged, errors.LayerInUse)):
                client.apply_diff(damaged, tar({"new": b""}))
        assert [row.problem for row in client.check(repair=True).problems]
        client.cleanup()
        if at != "diff/base":
            assert client.remove(id).removed
        assert (tree(victim), os.listxattr(victim), victim.stat().st_mode) == before
        assert not mountinfo.mounted_under(str(victim))
        assert "incident" not in served.log
