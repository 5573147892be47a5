"""What every union file system must do for us, whichever it is."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd.kernel import mountinfo, syscalls
from aufsd.union.backend import Union
from aufsd_client.errors import MountFailed, TooManyLayers
from tests.conformance.layers import Layers, open_layers, tree
from tests.daemon import eventually
from tests.trees import deepen, in_memory

pytestmark = pytest.mark.mounts


def test_shows_the_nearest_of_each_name(shown: Layers) -> None:
    base = shown.add({"a": "base", "b": "base", "d/x": "base"})
    middle = shown.add({"b": "middle", "d/y": "middle"})
    top = shown.add({"d/y": "top"})
    union = shown.mount(top, middle, base)
    assert tree(union.target) == {"a": "base", "b": "middle", "d/": "", "d/x": "base", "d/y": "top"}


def test_whiteouts_and_opaque_directories_hide(shown: Layers) -> None:
    base = shown.add({"gone": "", "d/old": "", "dir-gone/x": "", "kept/x": "", "deep/a/b": ""})
    middle = shown.add({"d/new": "middle"})
    shown.delete(middle, "gone")
    shown.delete(middle, "dir-gone")
    shown.delete(middle, "deep/a/b")
    shown.make_opaque(middle, "d")
    top = shown.add()
    union = shown.mount(top, middle, base)
    assert tree(union.target) == {
        "d/": "",
        "d/new": "middle",
        "kept/": "",
        "kept/x": "",
        "deep/": "",
        "deep/a/": "",
    }


def test_what_is_deleted_may_be_made_again_in_another_type(shown: Layers) -> None:
    base = shown.add({"file": "", "dir/x": ""})
    middle = shown.add()
    shown.delete(middle, "file")
    shown.delete(middle, "dir")
    top = shown.add({"file/now a directory": "", "dir": "now a file"})
    union = shown.mount(top, middle, base)
    assert tree(union.target) == {"file/": "", "file/now a directory": "", "dir": "now a file"}


def test_changes_go_to_the_top_and_are_there_at_the_next_mount(shown: Layers) -> None:
    base = shown.add({"changed": "old", "removed": "", "d/removed": "", "d/kept": "", "e/x": ""})
    below = tree(shown.content(base))
    top = shown.add()
    union = shown.mount(top, base)
    root = Path(union.target)
    (root / "changed").write_text("new")
    (root / "removed").unlink()
    (root / "d/removed").unlink()
    (root / "e/x").unlink()
    (root / "e").rmdir()
    (root / "e").mkdir()
    (root / "added").write_text("new")
    seen = tree(union.target)
    assert seen == {"changed": "new", "d/": "", "d/kept": "", "e/": "", "added": "new"}
    shown.unmount(union)
    assert tree(shown.content(base)) == below
    if not shown.backend.snapshots:
        assert os.listdir(union.target) == []
        shown.backend.mount(union)
    assert tree(union.target) == seen
    shown.unmount(union)
    assert tree(shown.mount(shown.add(), top, base).target) == seen


def test_a_read_only_mount_refuses_a_write(shown: Layers) -> None:
    base = shown.add({"a": "base"})
    top = shown.add({"b": "top"})
    union = shown.mount(top, base, read_only=True)
    before = sorted(os.listdir(shown.content(top)))
    assert before == ["b"] or shown.backend.snapshots
    for name in ("a", "b", "new"):
        with pytest.raises(OSError, match="Read-only file system"):
            Path(union.target, name).write_text("changed")
    assert tree(union.target) == {"a": "base", "b": "top"}
    assert sorted(os.listdir(shown.content(top))) == before


def test_dpkg_replaces_a_file_by_link_and_rename(shown: Layers) -> None:
    """moby#19282: what the seed's noplink broke."""
    base = shown.add({"perl": "old"})
    os.link(f"{shown.content(base)}/perl", f"{shown.content(base)}/perl5.36")
    top = shown.add()
    union = shown.mount(top, base)
    root = Path(union.target)
    for name in ("perl", "perl5.36"):
        (root / f"{name}.dpkg-new").write_text("new")
        os.link(root / name, root / f"{name}.dpkg-tmp")
        os.rename(root / f"{name}.dpkg-new", root / name)
        (root / f"{name}.dpkg-tmp").unlink()
    shown.mount_again(union)
    assert tree(union.target) == {"perl": "new", "perl5.36": "new"}


@pytest.mark.parametrize("depth", [2, 43, 80, 120, 127])
@pytest.mark.parametrize("read_only", [False, True])
def test_long_chains_of_long_ids_show_every_layer(
    depth: int, read_only: bool, backend_name: str, tmp_path: Path
) -> None:
    """Docker's TestMountMoreThan42Layers: every tenth layer deletes the file of the one before."""
    root = f"{tmp_path}/{'long root/' * 12}store"
    with open_layers(backend_name, root) as layers:
        chain: list[str] = []
        for number in range(1, depth + 1):
            chain.insert(0, layers.add({f"file-{number}": str(number)}, id=f"{number:064x}"))
            if number % 10 == 0:
                layers.delete(chain[0], f"file-{number - 1}")
        union = layers.mount(*chain, read_only=read_only)
        seen = {f"file-{n}": str(n) for n in range(1, depth + 1) if (n + 1) % 10 or n == depth}
        assert tree(union.target) == seen
        assert layers.backend.is_whole(union)
        layers.backend.unmount(union.target)


def matching_lengths() -> Iterator[int]:
    """Lengths of ROOT/diff for which the page ends at or near the end of a branch."""
    # Docker's test: ":" + ROOT/diff + "/" + 64 digits + "=ro+wh" is a branch
    yield from (n for n in range(90, 130) if 4095 % (n + 72) in (0, 1, 2, n + 70, n + 71))
    yield from (n for n in range(90, 130) if 4095 % (n + 66) in (0, 1, 2, n + 64, n + 65))


@pytest.mark.parametrize("length", sorted(set(matching_lengths())))
def test_a_page_that_ends_between_two_branches(
    length: int, backend_name: str, tmp_path: Path
) -> None:
    """Docker's TestMountMoreThan42LayersMatchingPathLength."""
    fill = length - len(f"{tmp_path}//diff")
    assert fill > 0
    with open_layers(backend_name, f"{tmp_path}/{'r' * fill}") as layers:
        chain = [layers.add({f"file-{n}": ""}, id=f"{n:064x}") for n in range(60)]
        for depth in range(15, 61):
            union = layers.mount(*chain[:depth])
            assert len(os.listdir(union.target)) == depth
            layers.backend.unmount(union.target)


def test_as_many_branches_as_the_backend_says(layers: Layers) -> None:
    most = min(layers.backend.max_branches, 511)
    chain = [layers.add({f"file-{n}": ""}, id=f"{n:064x}") for n in range(most + 1)]
    for read_only in (False, True):
        union = layers.mount(*chain[:most], read_only=read_only)
        assert len(os.listdir(union.target)) == most
        assert layers.backend.is_whole(union)
        layers.backend.unmount(union.target)
    if most == layers.backend.max_branches:
        with pytest.raises(TooManyLayers) as caught:
            layers.mount(*chain, read_only=True)
        assert caught.value.data == {"layers": most + 1, "limit": most}


@pytest.mark.parametrize("special", [*",:=\"'\\#{} \t\n", "{0}", "ünï", "\udcff", "a=ro:b,c"])
def test_any_character_in_the_path_of_a_store(
    special: str, backend_name: str, tmp_path: Path
) -> None:
    if backend_name == "fuse-overlayfs" and (":" in special or special == "\\"):
        pytest.skip("fuse-overlayfs 1.10 splits the path of its upper directory there")
    with open_layers(backend_name, f"{tmp_path}/a{special}b") as layers:
        base = layers.add({"a": "base", "b": "base"})
        middle = layers.add({"b": "middle"})
        union = layers.mount(layers.add({"c": "top"}), middle, base)
        assert tree(union.target) == {"a": "base", "b": "middle", "c": "top"}
        assert layers.backend.is_mounted(union.target)
        rows = mountinfo.mounted_under(layers.layout.root)
        assert [(row.mount_point, row.fstype.removeprefix("fuse.")) for row in rows] == [
            (union.target, backend_name)
        ]


@pytest.mark.parametrize("depth", [3, 200])
@pytest.mark.parametrize("place", ["nearest", "last"])
@pytest.mark.parametrize("fault", ["missing", "file"])
def test_a_bad_branch_is_named_and_nothing_stays_mounted(
    fault: str, place: str, depth: int, layers: Layers
) -> None:
    """At the end of a long chain it is found when the first calls have succeeded (aufs)."""
    depth = min(depth, layers.backend.max_branches)
    chain = [layers.add({f"file-{n}": ""}, id=f"{n:064x}") for n in range(depth)]
    bad = layers.content(chain[1 if place == "nearest" else -1])
    os.rename(bad, f"{bad}.away")
    if fault == "file":
        Path(bad).touch()
    with pytest.raises(MountFailed) as caught:
        layers.mount(*chain)
    data = caught.value.data
    assert data["id"] == chain[0]
    assert data["errno"] in ("ENOENT", "ENOTDIR", "EINVAL")
    assert bad in str(data["cause"])
    assert bad in str(data["options"])
    assert mountinfo.mounted_under(layers.layout.root) == []
    assert os.listdir(layers.union(chain[0]).target) == []


def test_a_missing_mount_point_is_named(layers: Layers) -> None:
    union = layers.union(layers.add(), layers.add())
    os.rmdir(union.target)
    with pytest.raises(MountFailed, match=f"mount point {union.target} is missing"):
        layers.backend.mount(union)


def test_a_label_without_selinux_is_told(layers: Layers) -> None:
    union = layers.union(layers.add(), layers.add())
    labelled = Union(
        union.id,
        union.top,
        union.lowers,
        union.target,
        union.work,
        "system_u:object_r:x_t:s0:c1,c2",
    )
    if os.path.exists("/sys/fs/selinux/policyvers"):
        pytest.skip("this kernel takes the label")
    with pytest.raises(MountFailed, match="no SELinux or no policy"):
        layers.backend.mount(labelled)
    assert not layers.backend.is_mounted(union.target)


def test_unmounting_a_busy_union_is_ebusy_and_leaves_it(layers: Layers) -> None:
    union = layers.mount(layers.add(), layers.add({"file": "content"}))
    with open(f"{union.target}/file"), pytest.raises(OSError, match="busy") as caught:
        layers.backend.unmount(union.target)
    assert caught.value.errno == errno.EBUSY
    assert tree(union.target) == {"file": "content"}
    layers.backend.unmount(union.target)
    assert not layers.backend.is_mounted(union.target)


def test_unmounting_what_is_not_mounted(layers: Layers) -> None:
    union = layers.union(layers.add(), layers.add())
    with pytest.raises(OSError, match="Invalid argument") as caught:
        layers.backend.unmount(union.target)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(FileNotFoundError):
        layers.backend.unmount(f"{union.target}/none")
    assert not layers.backend.is_mounted(f"{union.target}/none")
    assert not layers.backend.is_whole(union)


def test_a_directory_inside_a_union_is_not_mounted(layers: Layers) -> None:
    """statfs(2) alone says yes of it: moby e8513675a2."""
    union = layers.mount(layers.add(), layers.add({"d/x": ""}))
    assert layers.backend.is_mounted(union.target)
    assert not layers.backend.is_mounted(f"{union.target}/d")


def test_another_file_system_at_the_mount_point_is_not_a_union(layers: Layers) -> None:
    union = layers.union(layers.add(), layers.add())
    syscalls.mount("none", union.target, "tmpfs", 0)
    assert not layers.backend.is_mounted(union.target)


def test_a_writable_branch_of_a_detached_union_is_not_mounted_again(layers: Layers) -> None:
    layers.need_exclusive()
    union = layers.mount(layers.add(), layers.add({"file": ""}))
    with open(f"{union.target}/file"):
        syscalls.umount2(union.target, syscalls.MNT_DETACH)
        with pytest.raises(MountFailed, match="still written by another mount") as caught:
            layers.backend.mount(union)
        assert caught.value.data["errno"] == "EBUSY"
        assert not layers.backend.is_mounted(union.target)
    layers.backend.mount(union)
    assert layers.backend.is_mounted(union.target)


def test_nor_one_that_lives_on_in_another_mount_namespace(layers: Layers) -> None:
    layers.need_exclusive()
    union = layers.mount(layers.add(), layers.add())
    program = f"""
import sys
from aufsd.kernel import syscalls
syscalls.unshare({syscalls.CLONE_NEWNS})
syscalls.mount("none", "/", "", {syscalls.MS_REC | syscalls.MS_PRIVATE})
print("copied", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"copied\n"
        layers.backend.unmount(union.target)
        with pytest.raises(MountFailed, match="still written by another mount"):
            layers.backend.mount(union)
        child.communicate()
    # with its last mount gone, what serves it (fuse-overlayfs) ends a moment later
    eventually(lambda: not is_held(layers, union))


def is_held(layers: Layers, union: Union) -> bool:
    """Whether the union's writable branch is still in use elsewhere; mounts it if it is not."""
    try:
        layers.backend.mount(union)
    except MountFailed:
        return True
    return False


def test_a_branch_that_another_union_reads_may_be_written(layers: Layers) -> None:
    """A child of a layer that is mounted read-write is allowed."""
    base, parent, child = layers.add({"a": ""}), layers.add(), layers.add()
    layers.mount(child, parent, base)
    union = layers.mount(parent, base)
    Path(union.target, "b").touch()
    assert tree(union.target) == {"a": "", "b": ""}


def test_what_a_crash_left_in_the_work_directory_does_no_harm(layers: Layers) -> None:
    union = layers.union(layers.add(), layers.add({"a": ""}))
    os.makedirs(f"{union.work}/work/incompat/volatile")
    os.makedirs(f"{union.work}/index")
    Path(union.work, "xino").write_text("")
    layers.backend.mount(union)
    assert tree(union.target) == {"a": ""}


def test_mounting_leaves_no_descriptor_and_no_working_directory_behind(layers: Layers) -> None:
    chain = [layers.add() for _ in range(100)]
    before = sorted(os.listdir("/proc/self/fd")), os.getcwd()
    union = layers.mount(*chain)
    layers.backend.unmount(union.target)
    os.rename(layers.content(chain[-1]), f"{layers.content(chain[-1])}.away")
    with pytest.raises(MountFailed):
        layers.mount(*chain)
    assert (sorted(os.listdir("/proc/self/fd")), os.getcwd()) == before


def test_the_probe_leaves_nothing_behind(layers: Layers) -> None:
    assert os.listdir(layers.layout.probes) == []
    assert mountinfo.mounted_under(layers.layout.root) == []


def test_a_work_directory_that_cannot_be_made_is_a_failed_mount(layers: Layers) -> None:
    union = layers.union(layers.add(), layers.add())
    os.makedirs(os.path.dirname(union.work), exist_ok=True)
    Path(union.work).touch()
    with pytest.raises(MountFailed, match=f"directory {union.work} is no directory") as caught:
        layers.backend.mount(union)
    assert caught.value.data["errno"] in ("EEXIST", "ENOTDIR")
    assert not layers.backend.is_mounted(union.target)


def test_a_work_directory_with_a_deep_tree_in_it_stops_no_mount(
    backend_name: str, tmp_path: Path
) -> None:
    """What a kernel or a helper left there after a crash, or somebody put there."""
    with (
        in_memory(tmp_path / "memory") as memory,
        open_layers(backend_name, f"{memory}/store") as layers,
    ):
        union = layers.union(layers.add(), layers.add({"file": "content"}))
        left = Path(union.work, "work/left")
        left.mkdir(parents=True)
        os.close(deepen(left))
        layers.backend.mount(union)
        assert os.listdir(union.target) == ["file"]
