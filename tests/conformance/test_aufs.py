"""What only aufs does, and what has to be done about it."""

import os
import resource
import stat
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from aufsd.kernel import mountinfo, syscalls
from aufsd.union import aufs, plink
from aufsd.union.backend import Union
from aufsd.union.choice import PROBES
from aufsd.union.overlay import Overlay
from aufsd_client.errors import MountFailed
from tests.conformance.layers import Layers, tree

pytestmark = [pytest.mark.mounts, pytest.mark.aufs]


@pytest.fixture
def backend_name() -> str:
    """The one backend of these tests."""
    return "aufs"


@pytest.fixture
def linked(layers: Layers) -> str:
    """A layer with `a`, `d/b` and `c` as names of one file."""
    base = layers.add({"a": "old", "d/": "", "other": "other"})
    content = layers.content(base)
    os.link(f"{content}/a", f"{content}/d/b")
    os.link(f"{content}/a", f"{content}/c")
    return base


def plinks(layers: Layers, id: str) -> list[str]:
    return os.listdir(f"{layers.content(id)}/{plink.DIRECTORY}")


def test_all_names_of_a_written_file_show_the_new_content_after_a_remount(
    layers: Layers, linked: str
) -> None:
    """Docker's TestHardlinks, with a look at the content after the union is gone."""
    union = layers.mount(layers.add(), linked)
    Path(union.target, "a").write_text("new")
    assert tree(union.target) == {"a": "new", "d/": "", "d/b": "new", "c": "new", "other": "other"}
    layers.backend.unmount(union.target)
    assert plinks(layers, union.id) == []
    layers.backend.mount(union)
    assert tree(union.target) == {"a": "new", "d/": "", "d/b": "new", "c": "new", "other": "other"}
    assert len({os.lstat(f"{union.target}/{name}").st_ino for name in ("a", "d/b", "c")}) == 1
    layers.backend.unmount(union.target)
    above = layers.mount(layers.add(), union.id, linked)
    assert Path(above.target, "d/b").read_text() == "new"


def test_without_the_flush_the_other_names_show_the_old_content(
    layers: Layers, linked: str
) -> None:
    """The fault that the flush is for: names that are never opened are not linked."""
    union = layers.mount(layers.add(), linked)
    Path(union.target, "a").write_text("new")
    syscalls.umount2(union.target)
    assert len(plinks(layers, union.id)) == 1
    layers.backend.mount(union)
    assert Path(union.target, "a").read_text() == "new"
    assert Path(union.target, "c").read_text() == "old"


def test_the_branch_of_a_live_union_is_whole_after_a_flush(layers: Layers, linked: str) -> None:
    """`diff` of a mounted layer reads the branch."""
    union = layers.mount(layers.add(), linked)
    Path(union.target, "a").write_text("new")
    branch = Path(layers.content(union.id))
    assert not (branch / "d").exists()
    layers.backend.flush(union.target)
    assert {(branch / name).read_text() for name in ("a", "d/b", "c")} == {"new"}
    assert (branch / "a").stat().st_ino == (branch / "d/b").stat().st_ino
    assert not (branch / "other").exists()
    Path(union.target, "c").write_text("newer")
    layers.backend.unmount(union.target)
    assert (branch / "d/b").read_text() == "newer"


MAKE: dict[str, Callable[[str], None]] = {
    "symlink": lambda path: os.symlink("somewhere", path),
    "fifo": os.mkfifo,
    "device": lambda path: os.mknod(path, stat.S_IFCHR, os.makedev(1, 3)),
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK),
    "set-id file": lambda path: os.close(os.open(path, os.O_CREAT, 0o600)),
}


@pytest.mark.parametrize("kind", MAKE)
def test_hard_links_of_every_type_stay_together(kind: str, layers: Layers) -> None:
    base = layers.add({"d/": ""})
    first, second = f"{layers.content(base)}/first", f"{layers.content(base)}/d/second"
    MAKE[kind](first)
    if kind == "set-id file":
        os.chmod(first, 0o4755)
        # CAP_NET_RAW in a version 2 capability (linux/capability.h)
        os.setxattr(
            first, "security.capability", bytes.fromhex("01000002" + "00200000" + "00" * 12)
        )
    os.link(first, second, follow_symlinks=False)
    union = layers.mount(layers.add(), base)
    os.utime(f"{union.target}/first", ns=(0, 10**9), follow_symlinks=False)
    layers.backend.unmount(union.target)
    found = [os.lstat(f"{layers.content(union.id)}/{name}") for name in ("first", "d/second")]
    assert found[0].st_ino == found[1].st_ino
    assert {status.st_mtime_ns for status in found} == {10**9}
    if kind == "set-id file":
        assert stat.S_IMODE(found[1].st_mode) == 0o4755
        name = f"{layers.content(union.id)}/d/second"
        assert len(os.getxattr(name, "security.capability")) == 20


def test_a_name_deleted_meanwhile_is_not_brought_back(layers: Layers, linked: str) -> None:
    union = layers.mount(layers.add(), linked)
    Path(union.target, "a").write_text("new")
    Path(union.target, "c").unlink()
    layers.backend.unmount(union.target)
    layers.backend.mount(union)
    assert tree(union.target) == {"a": "new", "d/": "", "d/b": "new", "other": "other"}


def test_pseudo_links_of_an_earlier_union_are_harmless(layers: Layers, linked: str) -> None:
    """Docker left them in its stores; their numbers are those of other files in a new union."""
    os.symlink("../other", f"{layers.content(linked)}/d/symlink")
    union = layers.mount(layers.add(), linked)
    Path(union.target, "a").write_text("new")
    syscalls.umount2(union.target)
    (left,) = plinks(layers, union.id)
    old = f"{layers.content(union.id)}/{plink.DIRECTORY}"
    for number in range(2, 100):
        os.link(f"{old}/{left}", f"{old}/{number}.1")
    os.mkdir(f"{old}/directory")
    content = sorted(os.listdir(layers.content(union.id)))
    layers.backend.mount(union)
    before = tree(union.target)
    layers.backend.unmount(union.target)
    assert sorted(os.listdir(layers.content(union.id))) == content
    layers.backend.mount(union)
    assert tree(union.target) == before
    assert plinks(layers, union.id) == ["directory"]


def test_a_flush_stays_out_of_what_is_mounted_inside(layers: Layers, linked: str) -> None:
    union = layers.mount(layers.add(), linked)
    inside = f"{union.target}/d"
    syscalls.mount("none", inside, "tmpfs", 0)
    try:
        Path(inside, "b").write_text("another file")
        Path(union.target, "a").write_text("new")
        layers.backend.flush(union.target)
    finally:
        syscalls.umount2(inside)
    branch = Path(layers.content(union.id))
    assert (branch / "c").read_text() == "new"
    assert not (branch / "d").exists()


def test_a_union_of_aufs_is_flushed_by_the_overlay_backend_too(layers: Layers, linked: str) -> None:
    """It outlives the daemon, and the next daemon may be set to another backend."""
    overlay = PROBES["overlay"](layers.layout)
    assert isinstance(overlay, Overlay)
    union = layers.mount(layers.add(), linked)
    Path(union.target, "a").write_text("new")
    overlay.unmount(union.target)
    assert Path(layers.content(union.id), "c").read_text() == "new"


def test_part_of_a_chain_is_not_whole(layers: Layers) -> None:
    """What a process killed between two mount calls leaves."""
    chain = [layers.add() for _ in range(100)]
    union = layers.union(*chain)
    calls = layers.backend.plan(union)
    assert len(calls) == 2
    layers.backend.mount(union)
    assert aufs.branch_count(union.target) == 100
    layers.backend.unmount(union.target)
    layers.mount(*chain[:70])
    assert layers.backend.is_mounted(union.target)
    assert not layers.backend.is_whole(union)
    assert layers.backend.is_part(union)


def test_as_many_branches_are_not_the_same(layers: Layers) -> None:
    """Which they are counts, also where the names have to be escaped."""
    top, base, other = layers.add(id="top"), layers.add(id="base"), layers.add(id="other")
    union = layers.mount(top, base)
    assert aufs.branches(union.target) == (union.top, *union.lowers)
    assert layers.backend.is_whole(union)
    assert not layers.backend.is_part(union)
    for chain in ((top, other), (top, other, base)):
        assert not layers.backend.is_whole(layers.union(*chain))
        assert not layers.backend.is_part(layers.union(*chain))
    assert layers.backend.is_part(layers.union(top, base, other))


def test_a_long_read_only_chain_stays_read_only(layers: Layers) -> None:
    """A remount without MS_RDONLY would make it writable."""
    union = layers.mount(*[layers.add() for _ in range(100)], read_only=True)
    with pytest.raises(OSError, match="Read-only"):
        Path(union.target, "new").touch()
    assert os.listdir(layers.content(union.id)) == []


@pytest.mark.parametrize(
    "made_before",
    [(), (".wh..wh.aufs", ".wh..wh.orph"), (".wh..wh.aufs", ".wh..wh.orph", ".wh..wh.plnk")],
    ids=["none", "some", "all"],
)
def test_what_aufs_makes_at_the_top_of_a_layer_is_no_change_of_it(
    made_before: tuple[str, ...], layers: Layers
) -> None:
    base, top = layers.add({"d/": ""}), layers.add({"a": ""})
    for name in made_before:
        layers.write(top, name if name == ".wh..wh.aufs" else f"{name}/", "")
    os.utime(layers.content(top), ns=(5, 10**9 + 7))
    union = layers.mount(top, base)
    assert ".wh..wh.orph" in os.listdir(union.top)
    assert {os.stat(path).st_mtime_ns for path in (union.target, union.top)} == {10**9 + 7}
    Path(union.target, "b").touch()
    assert os.stat(union.target).st_mtime_ns == os.stat(union.top).st_mtime_ns > 10**9 + 7


@pytest.mark.parametrize(
    ("fstype", "options", "cause"),
    [
        ("overlay", "lowerdir={0}/one:{0}/two", "lies on overlayfs, which aufs refuses"),
        ("proc", "", "the kernel says: .*unsupported filesystem"),
    ],
)
@pytest.mark.parametrize("depth", [2, 100], ids=["one call", "several calls"])
def test_a_branch_that_aufs_refuses_is_explained_and_nothing_stays_mounted(
    fstype: str, options: str, cause: str, depth: int, layers: Layers, tmp_path: Path
) -> None:
    chain = [layers.add() for _ in range(depth)]
    bad = layers.content(chain[-1])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    syscalls.mount("none", bad, fstype, 0, options.format(tmp_path))
    with pytest.raises(MountFailed, match=cause) as caught:
        layers.mount(*chain)
    assert caught.value.data["errno"] == "EINVAL"
    assert bad in str(caught.value.data["options"])
    assert [row.mount_point for row in mountinfo.mounted_under(layers.layout.root)] == [bad]


def test_an_opaque_root_hides_nothing(layers: Layers) -> None:
    """aufs ignores the marker there, and on aufs the union is what aufs shows."""
    base, top = layers.add({"a": "base"}), layers.add({"b": "top"})
    layers.make_opaque(top)
    assert tree(layers.mount(layers.add(), top, base).target) == {"a": "base", "b": "top"}


def test_concurrent_mounts_do_not_share_a_translation_file(layers: Layers) -> None:
    """moby#21545: one xino path for all made concurrent mounts fail with EINVAL."""
    base = layers.add({"a": ""})
    unions = [layers.union(layers.add(), base) for _ in range(16)]

    def again_and_again(union: Union) -> None:
        # each as a daemon of its own: one backend is used by one thread
        assert isinstance(layers.backend, aufs.Aufs)
        backend = replace(layers.backend, _known=set())
        for _ in range(10):
            backend.mount(union)
            assert os.listdir(union.target) == ["a"]
            backend.unmount(union.target)

    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(again_and_again, unions))
    assert [os.listdir(union.work) for union in unions] == [["union"]] * len(unions)


def test_of_later_writes_to_a_lower_branch_what_was_looked_at_before_stays_old(
    layers: Layers,
) -> None:
    """Why `create` warns of a parent that is mounted writable."""
    base = layers.add({"changed": "old", "deleted": "old", "unseen": "old"})
    parent = layers.mount(layers.add({"in place": "old"}), base)
    child = layers.mount(layers.add(), parent.id, base)
    looked_at = {"changed": "old", "deleted": "old", "in place": "old"}
    assert {name: Path(child.target, name).read_text() for name in looked_at} == looked_at
    assert not Path(child.target, "made").exists()
    for name in ("changed", "in place", "unseen", "made"):
        Path(parent.target, name).write_text("new")
    Path(parent.target, "deleted").unlink()
    # the parent had a file of its own already, or nobody had looked
    assert Path(child.target, "in place").read_text() == "new"
    assert Path(child.target, "unseen").read_text() == "new"
    assert Path(child.target, "changed").read_text() == "old"
    assert Path(child.target, "deleted").read_text() == "old"
    assert not Path(child.target, "made").exists()
    layers.mount_again(child)
    assert tree(child.target) == dict.fromkeys(("changed", "in place", "unseen", "made"), "new")


def test_lower_permissions_do_not_count_with_dirperm1(layers: Layers) -> None:
    """moby#783: a directory opened to others in an upper layer stayed closed."""
    assert dict(layers.backend.facts)["dirperm1"] == "true"
    base = layers.add({"d/file": "content"})
    os.chmod(f"{layers.content(base)}/d", 0o700)
    union = layers.mount(layers.add(), base)
    os.chmod(f"{union.target}/d", 0o755)
    # the child changes its directory while it is still root
    read = ["cat", "d/file"]
    done = subprocess.run(read, cwd=union.target, user=1000, capture_output=True, check=False)
    assert (done.stdout, done.stderr) == (b"content", b"")


@pytest.mark.parametrize("kind", ["", "/"], ids=["file", "directory"])
def test_names_that_are_too_long_for_aufs_do_not_stop_a_flush(
    kind: str, layers: Layers, linked: str
) -> None:
    """They come from an image, are listed, and cannot be looked up: AUFS_MAX_NAMELEN is 242."""
    long, longest = "n" * 243, "o" * 255
    for name in (long, longest):
        layers.write(linked, f"{name}{kind}", "")
    union = layers.mount(layers.add(), linked)
    assert {long, longest} < set(os.listdir(union.target))
    for name in (long, longest):
        with pytest.raises(OSError, match="File name too long"):
            os.lstat(f"{union.target}/{name}")
    Path(union.target, "a").write_text("new")
    layers.backend.unmount(union.target)
    assert plinks(layers, union.id) == []
    assert Path(layers.content(union.id), "d/b").read_text() == "new"


def test_a_flush_finds_names_in_wide_and_deep_trees(layers: Layers, linked: str) -> None:
    """With as few descriptors as the tree is deep."""
    deep = "/".join(["deep"] * 40)
    for name in [f"wide/{n}" for n in range(300)] + [deep]:
        layers.write(linked, f"{name}/", "")
    content = layers.content(linked)
    for name in ("wide/7/x", f"{deep}/x"):
        os.link(f"{content}/a", f"{content}/{name}")
    union = layers.mount(layers.add(), linked)
    Path(union.target, "a").write_text("new")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        layers.backend.flush(union.target)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    branch = Path(layers.content(union.id))
    assert {(branch / name).read_text() for name in ("wide/7/x", f"{deep}/x")} == {"new"}
    assert os.listdir(branch / "wide") == ["7"]
