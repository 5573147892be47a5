"""Damaged stores: the damage is told, the rest is served, and repair deletes nothing."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from aufsd.kernel import syscalls
from aufsd_client import Client, errors
from tests.archives import tar
from tests.crash.strace import traced, untraceable
from tests.daemon import Daemon

pytestmark = pytest.mark.service


@pytest.fixture
def stacked(served: Daemon, client: Client) -> Daemon:
    """`base`, `middle` on it, `top` on that, with a file each; and `other` alone, empty."""
    parent = ""
    for id in ("base", "middle", "top"):
        client.create(id, parent=parent)
        client.apply_diff(id, tar({id: b"x"}))
        parent = id
    client.create("other")
    return served


def damage(stacked: Daemon, what: Callable[[Path], object]) -> Client:
    """Damage the store while nobody serves it, and start again."""
    stacked.kill()
    what(stacked.root)
    stacked.start()
    return stacked.client()


def problems(client: Client, *, deep: bool = False, repair: bool = False) -> set[tuple[str, str]]:
    return {(each.id, each.problem) for each in client.check(deep=deep, repair=repair).problems}


def empty(root: Path) -> None:
    (root / "layers/top").write_text("")


def cut(root: Path) -> None:
    (root / "layers/top").write_text("middle\n")


def cut_in_a_name(root: Path) -> None:
    (root / "layers/top").write_text("middle\nba")


def binary(root: Path) -> None:
    (root / "layers/top").write_bytes(b"\0" * 12)


@pytest.mark.parametrize("what", [empty, cut, cut_in_a_name, binary])
def test_a_parents_file_that_was_lost_is_noticed_and_written_again(
    stacked: Daemon, what: Callable[[Path], object]
) -> None:
    with damage(stacked, what) as client:
        with pytest.raises(errors.LayerDamaged) as caught:
            client.get("top")
        assert caught.value.code == 106
        assert client.get("middle").references == 1
        assert client.health().status == "degraded"
        with pytest.raises(errors.LayerHasChildren):
            client.remove("middle", force=True)
        assert ("top", "damaged") in problems(client)
        assert ("top", "damaged") in problems(client, repair=True)
    assert (stacked.root / "layers/top").read_text() == "middle\nbase\n"
    # what was there before is kept
    assert os.listdir(stacked.root / ".aufsd/quarantine")
    with damage(stacked, lambda _: None) as client:
        assert problems(client) == set()
        assert sorted(os.listdir(client.get("top").path)) == ["base", "middle", "top"]


def without_content(root: Path) -> None:
    (root / "diff/middle").rename(root.parent / "lost")


def without_parent(root: Path) -> None:
    (root / "layers/middle").unlink()


def in_a_circle(root: Path) -> None:
    (root / "layers/base").write_text("top\nmiddle\nbase\n")


@pytest.mark.parametrize("what", [without_content, without_parent, in_a_circle])
def test_one_bad_layer_stops_neither_the_store_nor_the_start(
    stacked: Daemon, what: Callable[[Path], object]
) -> None:
    with damage(stacked, what) as client:
        for id in ("top", "middle"):
            with pytest.raises((errors.LayerDamaged, errors.LayerNotFound)):
                client.get(id)
        assert client.get("other").references == 1
        client.create("new", parent="other")
        assert client.get("new").mounted
        assert "top" in {id for id, _ in problems(client)}
        # and what is damaged can be removed
        assert client.remove("top").removed


def test_content_that_goes_while_the_daemon_serves_is_damage_and_no_failed_mount(
    stacked: Daemon, client: Client
) -> None:
    without_content(stacked.root)
    with pytest.raises(errors.LayerDamaged):
        client.get("top")
    assert stacked.mounts() == []
    assert ("middle", "missing-content") in problems(client)
    (stacked.root.parent / "lost").rename(stacked.root / "diff/middle")
    assert client.get("top").mounted
    assert problems(client) == set()


def test_a_parents_file_that_changes_while_the_daemon_serves_is_put_right(
    stacked: Daemon, client: Client
) -> None:
    empty(stacked.root)
    assert problems(client) == {("top", "parents-differ")}
    assert problems(client, repair=True) == {("top", "parents-differ")}
    assert problems(client) == set()
    assert (stacked.root / "layers/top").read_text() == "middle\nbase\n"


def test_what_belongs_to_no_layer_goes_into_quarantine_and_is_not_deleted(
    stacked: Daemon, client: Client
) -> None:
    root = stacked.root
    (root / "diff/stray").mkdir()
    (root / "diff/stray/precious").write_text("x")
    (root / "mnt/stray").mkdir()
    (root / "layers/not an id").write_text("x")
    (root / "layers/directory").mkdir()
    # no JSON can carry its name, and no terminal should
    os.mkdir(os.fsencode(root) + b"/diff/x\xff\n")
    found = {
        ("stray", "orphan-content"),
        ("stray", "orphan-mount-point"),
        ("x\\xff\\n", "orphan-content"),
        ("not an id", "stray-record"),
        ("directory", "stray-record"),
    }
    assert problems(client) == found
    assert (root / "diff/stray/precious").exists()
    assert problems(client, repair=True) == found
    assert problems(client) == set()
    (kept,) = (root / ".aufsd/quarantine").glob("*/precious")
    assert kept.read_text() == "x"


def test_repair_does_nothing_about_what_is_mounted(stacked: Daemon, client: Client) -> None:
    target = stacked.root / "mnt/stray"
    target.mkdir()
    syscalls.mount("tmpfs", str(target), "tmpfs", 0, "size=64k")
    (target / "precious").write_text("x")
    try:
        assert problems(client, repair=True) == {("stray", "mount-without-layer")}
        assert (target / "precious").read_text() == "x"
    finally:
        syscalls.umount2(str(target))


def test_modes_and_mount_points_are_put_right(stacked: Daemon, client: Client) -> None:
    (stacked.root / "diff").chmod(0o755)
    (stacked.root / "mnt/top").rmdir()
    assert problems(client, repair=True) == {("", "wrong-mode"), ("top", "missing-mount-point")}
    assert problems(client) == set()


def test_deep_looks_into_the_layers(stacked: Daemon, client: Client) -> None:
    content = stacked.root / "diff/top"
    (content / ".wh.base").write_text("")
    (content / "d").mkdir()
    os.setxattr(content / "d", "trusted.overlay.redirect", b"/elsewhere")
    assert problems(client) == set()
    assert problems(client, deep=True) >= {("top", "mixed-dialects"), ("top", "stray-xattr")}


def test_deep_names_what_aufs_cannot_open(stacked: Daemon, client: Client) -> None:
    client.convert("other", "aufs")
    for name in (b"n" * 242, b"n" * 243, b"d/" + b"\xff" * 255, b".wh." + b"w" * 242):
        path = os.path.join(os.fsencode(stacked.root), b"diff/other", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT))
    found = [(row.problem, row.detail) for row in client.check("other", deep=True).problems]
    assert {problem for problem, _ in found} == {"long-name"}
    names = [detail.partition(":")[0] for _, detail in found]
    assert names == [f"/{'n' * 243}", "/d/" + r"\xff" * 255]


def test_a_check_beside_running_calls_raises_no_false_alarm(
    stacked: Daemon, client: Client
) -> None:
    """Each looks wrong for a moment: made, applied to, mounted, converted, unmounted, removed."""
    over = threading.Event()
    rounds = 0

    def others(name: str) -> None:
        nonlocal rounds
        try:
            with stacked.client() as own:
                while not over.is_set():
                    own.create(name, parent="base")
                    for call in (
                        lambda: own.apply_diff(name, tar({name: b"x", ".wh.base": b""})),
                        lambda: own.convert(name, "aufs"),
                        lambda: Path(own.get(name).path, "new").write_bytes(b"x"),
                        lambda: own.put(name),
                        lambda: own.apply_diff(name, tar({"more": b"x"})),
                    ):
                        # a deep check reads it
                        with suppress(errors.LayerInUse):
                            call()
                    while not own.remove(name, in_use_ok=True).removed:
                        pass
                    rounds += 1
        finally:
            over.set()

    threads = [threading.Thread(target=others, args=(f"new{number}",)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in count():
            assert client.check(deep=number % 2 == 0, repair=number % 4 == 0).problems == []
            assert not over.is_set()
            if number >= 12 and rounds >= 4:
                break
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert problems(client, deep=True) == set()


# --- content against what was recorded when it was applied ----------------------------------------

FINGERPRINT = "trusted.aufsd.fingerprint"


def flip(path: Path) -> None:
    """Change one bit of a file, and nothing else that shows."""
    found = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        flip,
        lambda path: path.chmod(0o600),
        lambda path: os.chown(path, 7, -1),
        lambda path: os.setxattr(path, "user.x", b"1"),
        Path.unlink,
    ],
    ids=["bit", "mode", "owner", "xattr", "gone"],
)
@pytest.mark.parametrize("id", ["base", "top"])
def test_deep_finds_what_differs_from_what_was_applied(
    stacked: Daemon, client: Client, id: str, change: Callable[[Path], object]
) -> None:
    assert problems(client, deep=True) == set()
    change(stacked.root / "diff" / id / id)
    assert problems(client) == set()
    assert problems(client, deep=True, repair=True) == {(id, "content-differs")}
    (found,) = client.check(id, deep=True).problems
    assert not found.repaired
    assert ("contents" in found.detail) == (change in (flip, Path.unlink))
    # it is told, and left as it is
    assert client.get("top").mounted


def write_through_a_mount(stacked: Daemon, client: Client) -> None:
    path = Path(client.get("top").path)
    (path / "top").write_bytes(b"changed")
    (path / "base").unlink()
    client.put("top")


def write_into_a_base_layer(stacked: Daemon, client: Client) -> None:
    client.create("alone")
    client.apply_diff("alone", tar({"base": b"x"}))
    path = Path(client.get("alone").path)
    (path / "base").write_bytes(b"changed")
    client.put("alone")


def convert_there_and_back(stacked: Daemon, client: Client) -> None:
    client.apply_diff("other", tar({"d": None, "d/.wh.x": b"", "d/.wh..wh..opq": b"", "f": b"x"}))
    assert os.getxattr(stacked.root / "diff/other", FINGERPRINT)
    assert client.convert("other", "aufs").converted
    assert problems(client, deep=True) == set()
    assert client.convert("other", "overlay").converted
    assert os.getxattr(stacked.root / "diff/other", FINGERPRINT)


def make_anew(stacked: Daemon, client: Client) -> None:
    client.remove("top")
    client.create("top", parent="middle")
    client.apply_diff("top", tar({"another": b"y"}))


def apply_once_more(stacked: Daemon, client: Client) -> None:
    client.apply_diff("top", tar({"more": b"y"}))


def write_while_nobody_serves_through_a_mount_that_aufsd_did_not_make(
    stacked: Daemon, client: Client
) -> None:
    stacked.kill()
    root, work = stacked.root, stacked.directory / "work"
    work.mkdir()
    syscalls.mount(
        "none",
        str(root / "mnt/top"),
        "overlay",
        0,
        f"lowerdir={root}/diff/middle:{root}/diff/base,upperdir={root}/diff/top,workdir={work}",
    )
    (root / "mnt/top/top").write_bytes(b"changed")
    stacked.start()
    client.put("top")


@pytest.mark.parametrize(
    "change",
    [
        write_through_a_mount,
        write_into_a_base_layer,
        convert_there_and_back,
        make_anew,
        apply_once_more,
        write_while_nobody_serves_through_a_mount_that_aufsd_did_not_make,
    ],
)
def test_a_change_that_is_meant_is_no_damage(
    stacked: Daemon, client: Client, change: Callable[[Daemon, Client], None]
) -> None:
    change(stacked, client)
    assert problems(client, deep=True) == set()
    stacked.kill()
    stacked.start()
    assert problems(client, deep=True) == set()


def test_the_record_is_gone_from_the_disk_before_anybody_can_write(
    stacked: Daemon, client: Client
) -> None:
    if why := untraceable():
        pytest.skip(why)
    assert stacked.process is not None
    client.create("alone")
    client.apply_diff("alone", tar({"file": b"x"}))
    content = stacked.root / "diff"
    with traced([stacked.process.pid], "trace=fremovexattr,fsync,mount,move_mount") as trace:
        client.get("top")
        client.get("alone")
    calls = [
        rf'fremovexattr\(\d+<{content}/top>, "{FINGERPRINT}"',
        rf"fsync\(\d+<{content}/top>",
        r'mount\("none", "/proc/self/fd/\d+"',
        rf'fremovexattr\(\d+<{content}/alone>, "{FINGERPRINT}"',
        rf"fsync\(\d+<{content}/alone>",
    ]
    found = [next(at for at, line in enumerate(trace.lines) if re.search(c, line)) for c in calls]
    assert found == sorted(found)


def test_a_layer_that_is_mounted_read_only_keeps_its_record(
    stacked: Daemon, client: Client
) -> None:
    assert client.get("middle").read_only
    client.put("middle")
    flip(stacked.root / "diff/middle/middle")
    assert problems(client, deep=True) == {("middle", "content-differs")}


def test_a_store_that_nobody_serves_is_checked_offline(stacked: Daemon) -> None:
    command = [sys.executable, "-m", "aufsd", "check", "--root", str(stacked.root)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 3  # it is served
    stacked.kill()
    empty(stacked.root)
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (told.returncode, "top: damaged:" in told.stdout) == (1, True)
    repaired = subprocess.run([*command, "--repair"], capture_output=True, text=True, check=False)
    assert (repaired.returncode, "(repaired)" in repaired.stdout) == (0, True)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    flip(stacked.root / "diff/base/base")
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    deep = subprocess.run([*command, "--deep"], capture_output=True, text=True, check=False)
    assert (deep.returncode, "base: content-differs: contents" in deep.stdout) == (1, True)
