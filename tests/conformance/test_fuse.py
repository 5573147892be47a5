"""What only fuse-overlayfs does: a process serves each mount, and it may die or hang."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aufsd.kernel import mountinfo, probe, syscalls
from aufsd.kernel.peer import process
from aufsd.union import fuse, helper
from aufsd.union.backend import Union, Verdict
from aufsd.union.fuse import Fuse
from aufsd_client.errors import MountFailed
from tests.conformance.layers import Layers, tree

pytestmark = [pytest.mark.mounts, pytest.mark.fuse]


@pytest.fixture
def backend_name() -> str:
    """The one backend of these tests."""
    return "fuse-overlayfs"


@pytest.fixture
def backend(layers: Layers) -> Fuse:
    """Its backend."""
    assert isinstance(layers.backend, Fuse)
    return layers.backend


def killed(backend: Fuse, union: Union) -> int:
    """kill -9 of the helper of a union, and its end; its pid."""
    found = backend.helper(union.target)
    assert found is not None
    ended = os.pidfd_open(found[0])
    try:
        signal.pidfd_send_signal(ended, signal.SIGKILL)
        assert os.waitid(os.P_PIDFD, ended, os.WEXITED | os.WNOWAIT)
    finally:
        os.close(ended)
    return found[0]


def test_a_union_whose_helper_was_killed_is_not_mounted_and_mounts_again(
    layers: Layers, backend: Fuse
) -> None:
    union = layers.mount(layers.add(), layers.add({"a": "base", "b": "base"}))
    Path(union.target, "a").write_text("changed")
    Path(union.target, "b").unlink()
    backend.flush(union.target)
    pid = killed(backend, union)
    with pytest.raises(OSError, match="not connected"):
        os.listdir(union.target)
    assert not backend.is_mounted(union.target)
    assert mountinfo.is_mount_point(union.target)
    assert backend.clear(union.target)
    assert not mountinfo.is_mount_point(union.target)
    backend.mount(union)
    assert tree(union.target) == {"a": "changed"}
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # it was reaped


def test_what_the_dead_union_still_has_open_does_not_keep_the_layer_from_coming_back(
    layers: Layers, backend: Fuse
) -> None:
    union = layers.mount(layers.add(), layers.add({"file": "content"}))
    held = os.open(f"{union.target}/file", os.O_RDONLY)
    killed(backend, union)
    assert backend.clear(union.target)
    backend.mount(union)
    assert tree(union.target) == {"file": "content"}
    with pytest.raises(OSError, match="not connected"):
        os.close(held)


def test_a_dead_union_unmounts_too(layers: Layers, backend: Fuse) -> None:
    union = layers.mount(layers.add(), layers.add())
    killed(backend, union)
    backend.unmount(union.target)
    assert not mountinfo.is_mount_point(union.target)
    with pytest.raises(OSError, match="Invalid argument") as caught:
        backend.unmount(union.target)
    assert caught.value.errno == errno.EINVAL


def test_clear_touches_nothing_that_lives(layers: Layers, backend: Fuse) -> None:
    union = layers.mount(layers.add(), layers.add({"a": ""}))
    other = layers.union(layers.add(), layers.add())
    syscalls.mount("none", other.target, "tmpfs", 0)
    assert not backend.clear(union.target)
    assert not backend.clear(other.target)
    assert not backend.clear(layers.union(layers.add()).target)
    assert tree(union.target) == {"a": ""}
    assert mountinfo.is_mount_point(other.target)


def test_a_helper_that_hangs_delays_nobody_who_asks_whether_it_is_mounted(
    layers: Layers, backend: Fuse
) -> None:
    union = layers.mount(layers.add(), layers.add())
    found = backend.helper(union.target)
    assert found is not None
    os.kill(found[0], signal.SIGSTOP)
    try:
        assert backend.is_mounted(union.target)
        assert backend.is_whole(union)
        assert not backend.clear(union.target)
    finally:
        os.kill(found[0], signal.SIGCONT)


def test_another_file_system_over_a_live_union_is_not_it(layers: Layers, backend: Fuse) -> None:
    union = layers.mount(layers.add(), layers.add())
    syscalls.mount("none", union.target, "tmpfs", 0)
    assert not backend.is_mounted(union.target)
    syscalls.umount2(union.target)
    assert backend.is_mounted(union.target)


def test_a_program_that_never_answers_is_given_up(
    layers: Layers, backend: Fuse, tmp_path: Path
) -> None:
    mute = tmp_path / "mute"
    mute.write_text(
        f"#!{sys.executable}\nimport signal\nprint('says', flush=True)\nsignal.pause()\n"
    )
    mute.chmod(0o755)
    union = layers.union(layers.add(), layers.add())
    with pytest.raises(MountFailed, match="mute did not answer") as caught:
        replace(backend, program=str(mute), patience=0.2).mount(union)
    assert caught.value.data["errno"] == "ETIMEDOUT"
    assert not mountinfo.is_mount_point(union.target)
    assert not helper.is_alive(union.work)
    backend.mount(union)


def test_what_a_program_that_fails_said_is_the_cause(
    layers: Layers, backend: Fuse, tmp_path: Path
) -> None:
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho the moon is full >&2\nexit 1\n")
    failing.chmod(0o755)
    with pytest.raises(MountFailed, match="the moon is full"):
        replace(backend, program=str(failing)).mount(layers.union(layers.add(), layers.add()))
    with pytest.raises(MountFailed, match="No such file"):
        replace(backend, program=f"{failing}.gone").mount(layers.union(layers.add(), layers.add()))
    assert mountinfo.mounted_under(layers.layout.root) == []


def test_a_mount_outlives_the_process_that_made_it_and_is_known_to_the_next(
    layers: Layers, backend: Fuse
) -> None:
    union = layers.union(layers.add(), layers.add({"a": ""}))
    program = f"""
import os
from aufsd.store.layout import Layout
from aufsd.union import fuse
from aufsd.union.backend import Union
backend = fuse.probe(Layout({layers.layout.root!r}))
backend.mount({union!r})
print(os.getpid(), os.getsid(0), *backend.helper({union.target!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    maker, session, pid, start = map(int, done.stdout.split())
    assert backend.helper(union.target) == (pid, start)
    assert process(pid) == ("fuse-overlayfs", start)
    assert os.getsid(pid) not in (session, maker)
    assert backend.is_mounted(union.target)
    assert tree(union.target) == {"a": ""}
    backend.unmount(union.target)
    assert not helper.is_alive(union.work)


def test_the_helpers_own_xattrs_are_gone_after_an_unmount(layers: Layers, backend: Fuse) -> None:
    union = layers.mount(layers.add(), layers.add({"d/x": "", "file": "old", "e/f/g": "old"}))
    Path(union.target, "file").write_text("new")
    Path(union.target, "e/f/g").write_text("new")
    Path(union.target, "d/x").unlink()
    Path(union.target, "d").rmdir()
    Path(union.target, "d").mkdir()
    os.setxattr(f"{union.target}/file", "user.own", b"kept")
    backend.flush(union.target)
    top = Path(union.top)
    found = {name for path in top.rglob("*") for name in os.listxattr(path)}
    assert any(name.startswith("user.fuseoverlayfs.") for name in found)
    backend.unmount(union.target)
    found = {name for path in (top, *top.rglob("*")) for name in os.listxattr(path)}
    assert found == {"user.own"}
    assert (top / "d/.wh..wh..opq").exists()


@pytest.mark.parametrize("then", ["unmount", "mount"])
def test_nor_are_they_left_by_a_union_that_was_unmounted_behind_our_back(
    layers: Layers, backend: Fuse, then: str
) -> None:
    union = layers.mount(layers.add(), layers.add({"file": "old"}))
    Path(union.target, "file").write_text("new")
    found = backend.helper(union.target)
    assert found is not None
    syscalls.umount2(union.target)
    assert helper.wait(*found, 30)
    assert os.listxattr(f"{union.top}/file")
    if then == "unmount":
        with pytest.raises(OSError, match="Invalid argument"):
            backend.unmount(union.target)
    else:
        backend.mount(union)
    assert os.listxattr(f"{union.top}/file") == []


def test_an_opaque_root_ends_the_chain(layers: Layers) -> None:
    chain = [layers.add({f"file-{n}": ""}) for n in range(3)]
    layers.make_opaque(chain[1])
    for read_only in (False, True):
        union = layers.mount(*chain, read_only=read_only)
        assert sorted(tree(union.target)) == ["file-0", "file-1"]
        layers.backend.unmount(union.target)
    layers.make_opaque(chain[0])
    assert sorted(tree(layers.mount(*chain).target)) == ["file-0"]


def test_aufs_housekeeping_does_not_show(layers: Layers) -> None:
    base = layers.add({".wh..wh.orph/": "", ".wh..wh.plnk/": "", ".wh..wh.aufs": "", "a": ""})
    assert tree(layers.mount(layers.add(), base).target) == {"a": ""}


def test_set_id_bits_and_devices_work_in_the_union(layers: Layers) -> None:
    if probe.in_user_namespace():
        pytest.skip("no devices in a user namespace")
    base = layers.add()
    os.mknod(f"{layers.content(base)}/null", 0o020666, os.makedev(1, 3))
    union = layers.mount(layers.add(), base)
    assert Path(union.target, "null").read_bytes() == b""
    (row,) = mountinfo.mounted_under(union.target)
    assert not {"nodev", "nosuid"} & set(row.options)


def test_without_the_program_the_verdict_says_so(
    layers: Layers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "fuse-overlayfs"
    old.write_text("#!/bin/sh\necho fuse-overlayfs: version 1.4.0\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = fuse.probe(layers.layout)
    assert isinstance(found, Verdict)
    assert "has the version 1.4; it has to be 1.5 or later" in found.reason


@pytest.mark.userns
def test_an_unprivileged_user_is_served_in_a_user_namespace(tmp_path: Path) -> None:
    """By name: where overlayfs is refused there, as before Linux 5.11, `auto` comes to it."""
    program = """
import os, sys
from tests.conformance.layers import open_layers, tree
with open_layers("fuse-overlayfs", sys.argv[1]) as layers:
    union = layers.mount(layers.add(), layers.add({"gone": "", "d/x": "", "kept": "old"}))
    os.unlink(f"{union.target}/gone")
    os.unlink(f"{union.target}/d/x")
    os.rmdir(f"{union.target}/d")
    os.mkdir(f"{union.target}/d")
    open(f"{union.target}/kept", "w").write("new")
    layers.backend.unmount(union.target)
    top = union.top
    print(layers.backend.namespace, os.listxattr(f"{top}/d"), os.listxattr(f"{top}/kept"))
    print(sorted(tree(top)))
    layers.backend.mount(union)
    print(sorted(tree(union.target)))
"""
    done = subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "--mount"),
            *(sys.executable, "-c", program, str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "user [] []",
        "['.wh.gone', 'd/', 'd/.wh..wh..opq', 'kept']",
        "['d/', 'kept']",
    ], done.stderr
