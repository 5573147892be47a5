"""What only overlayfs does, and what has to be done about it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from aufsd.kernel import mountinfo, syscalls
from aufsd.kernel.log import KernelLog
from aufsd.union import exclusive, runner
from aufsd.union.branches import DATA_MAX, MountCall, longest
from aufsd.union.overlay import Overlay
from aufsd.union.runner import Vanished
from aufsd.union.scratch import scratch_dirs
from aufsd_client.errors import MountFailed
from tests.conformance.layers import Layers, open_layers, tree
from tests.small import full, small

pytestmark = pytest.mark.mounts


@pytest.fixture
def backend_name() -> str:
    """The one backend of these tests."""
    return "overlay"


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("told", [False, True])
def test_an_opaque_root_ends_the_chain(
    told: bool, depth: int, read_only: bool, layers: Layers
) -> None:
    """The kernel ignores the marker there, and the rule of Docker and OCI holds on overlay."""
    chain = [layers.add({f"file-{n}": ""}) for n in range(3)]
    union = layers.union(*chain, read_only=read_only)
    if told:
        union = replace(union, opaque_roots=frozenset({layers.content(chain[depth])}))
    else:
        layers.make_opaque(chain[depth])
    layers.backend.mount(union)
    assert sorted(tree(union.target)) == [f"file-{n}" for n in range(depth + 1)]
    if not read_only:
        Path(union.target, "new").touch()
        os.unlink(f"{union.target}/file-{depth}")
    assert os.listdir(f"{layers.layout.private}/empty") == []


def test_options_longer_than_the_page_are_refused_and_not_cut(layers: Layers) -> None:
    """No plan has them; the kernel would mount what fits, without a word."""
    dirs = tuple(layers.content(layers.add(id=f"{n:0100d}")) for n in range(40))
    target = layers.union(layers.add()).target
    data = "lowerdir=" + ":".join(f"{{{n}}}" for n in range(len(dirs)))
    call = MountCall(target, "overlay", data, dirs)
    assert longest(call) > DATA_MAX
    with pytest.raises(MountFailed, match="too many options or branches for one call") as caught:
        runner.run("layer", [call], stands=lambda _: False, log=KernelLog(-1))
    assert caught.value.data["errno"] == "E2BIG"
    assert mountinfo.mounted_under(layers.layout.root) == []


def test_a_layer_is_whole_by_itself(layers: Layers) -> None:
    """No redirect, metacopy or index: the content is the same over a copy of its parents."""
    base = layers.add({"d/x": "base", "file": "base"})
    top = layers.add()
    union = layers.mount(top, base)
    os.chmod(f"{union.target}/file", 0o600)
    with pytest.raises(OSError, match="cross-device"):
        os.rename(f"{union.target}/d", f"{union.target}/e")
    layers.backend.unmount(union.target)
    assert Path(layers.content(top), "file").read_text() == "base"
    copy = layers.add({"d/x": "base", "file": "another copy"})
    assert tree(layers.mount(top, copy).target) == {"d/": "", "d/x": "base", "file": "base"}


def test_a_branch_in_use_is_found_before_it_is_mounted_again(layers: Layers) -> None:
    """Not by the kernel's log, and without a trace in the layer or in the other union's work."""
    layers.need_exclusive()
    assert isinstance(layers.backend, Overlay)
    blind = replace(layers.backend, log=KernelLog(-1))
    union = layers.mount(layers.add(), layers.add({"file": "content"}))
    work = os.stat(f"{union.work}/work").st_ino
    before = os.listxattr(union.top)
    again = replace(union, target=layers.union(layers.add()).target)
    with pytest.raises(MountFailed, match="still written by another mount"):
        blind.mount(again)
    assert os.listdir(layers.layout.probes) == []
    assert os.listxattr(union.top) == before
    assert os.stat(f"{union.work}/work").st_ino == work
    Path(union.target, "file").write_text("copied up")
    layers.backend.unmount(union.target)
    blind.mount(again)
    assert blind.is_mounted(again.target)


def test_a_branch_in_use_is_found_on_a_full_disk_too(tmp_path: Path) -> None:
    """The number of the last union's device may be another's by now: a trial tells."""
    with (
        small(tmp_path / "disk") as disk,
        open_layers("overlay", f"{disk}/store") as layers,
    ):
        layers.need_exclusive()
        union = layers.mount(layers.add(), layers.add())
        scratch, namespace = layers.layout.probes, layers.backend.namespace
        with full(disk):
            assert exclusive.is_upper_in_use(union.top, scratch, namespace)
            layers.unmount(union)
            assert not exclusive.is_upper_in_use(union.top, scratch, namespace)


def test_a_trial_mount_that_could_not_be_unmounted_goes_with_its_directories(
    layers: Layers,
) -> None:
    with scratch_dirs(layers.layout.probes, "merged") as at:
        syscalls.mount("none", f"{at}/merged", "tmpfs", 0, "size=64k")
        held = os.open(f"{at}/merged", os.O_RDONLY)
    try:
        assert mountinfo.mounted_under(at) == []
        assert os.listdir(layers.layout.probes) == []
    finally:
        os.close(held)


def test_a_union_that_others_unmount_at_once_is_told_from_one_that_is_of_no_use(
    layers: Layers,
) -> None:
    union = layers.union(layers.add(), layers.add({"file": "content"}))
    os.makedirs(union.work)

    def taken_away(target: str) -> bool:
        syscalls.umount2(target)
        return layers.backend.is_mounted(target)

    for stands, expected in ((taken_away, Vanished), (lambda _: False, MountFailed)):
        with pytest.raises(MountFailed, match="ENODEV") as caught:
            runner.run("top", layers.backend.plan(union), stands=stands, log=KernelLog(-1))
        assert type(caught.value) is expected
        assert not layers.backend.is_mounted(union.target)


def test_a_union_that_is_no_work_of_ours_is_found_by_the_kernel_log(layers: Layers) -> None:
    union = layers.union(layers.add(), layers.add())
    other = layers.union(layers.add())
    for name in ("work", "merged"):
        os.makedirs(f"{layers.layout.root}/{name}")
    data = f"lowerdir={other.top},upperdir={union.top},workdir={layers.layout.root}/work"
    syscalls.mount("none", f"{layers.layout.root}/merged", "overlay", 0, data)
    assert isinstance(layers.backend, Overlay)
    if layers.backend.log.fd < 0:
        pytest.skip("the kernel's log cannot be read here")
    with pytest.raises(MountFailed, match="still written by another mount"):
        layers.backend.mount(union)
    assert not layers.backend.is_mounted(union.target)


def test_another_overlay_in_use_on_the_host_is_no_false_alarm(layers: Layers) -> None:
    """The line in the kernel's log names no path."""
    assert isinstance(layers.backend, Overlay)
    if layers.backend.log.fd < 0:
        pytest.skip("the kernel's log cannot be read here")
    said = os.open("/dev/kmsg", os.O_WRONLY)

    class LoudLog(KernelLog):
        def mark(self) -> None:
            super().mark()
            os.write(said, b"overlayfs: upperdir is in-use as upperdir/workdir of another mount\n")

    log = LoudLog(os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK))
    union = layers.union(layers.add(), layers.add({"a": ""}))
    try:
        replace(layers.backend, log=log).mount(union)
    finally:
        os.close(said)
        os.close(log.fd)
    assert tree(union.target) == {"a": ""}
