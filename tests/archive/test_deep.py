"""Layers deeper than paths, recursion and descriptors go: copied, converted, labelled, stripped."""

import os
import resource
import stat
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest

from aufsd.archive.jobs import Jobs, open_jobs
from aufsd.archive.offline import open_offline
from aufsd.archive.relabel import XATTR
from aufsd.archive.requests import Branch, Limits, Settings
from aufsd.store import whiteouts
from aufsd.store.dialect import Dialect
from aufsd.store.ids import LayerId
from aufsd.store.layout import Layout
from aufsd.store.walk import OPEN_AT_MOST
from aufsd.union import conversion, fuse_marks, plink
from tests.archive.converting import in_child
from tests.archive.shelf import NAMESPACE
from tests.trees import DEEP, deepen, in_memory, open_descriptors

pytestmark = pytest.mark.mounts

LABEL = "system_u:object_r:container_file_t:s0"
WIDE = 20_000


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path / "memory") as made:
        yield made


@pytest.fixture
async def jobs(memory: Path) -> AsyncIterator[Jobs]:
    """Archive jobs with fewer descriptors than the trees are deep."""
    layout = Layout(str(memory / "store"))
    for path in (layout.private, layout.diff, layout.staging):
        os.makedirs(path)
    limits = Limits(open_files=64)
    async with open_jobs(layout, limits=limits, sync="none", xattr_namespace=NAMESPACE) as made:
        yield made


def innermost(top: Path) -> int:
    """A descriptor of what `deepen` made, found again."""
    here = os.open(top, os.O_RDONLY)
    for _ in range(DEEP):
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    return here


async def test_a_deep_layer_is_copied(jobs: Jobs, memory: Path) -> None:
    content, staged = memory / "store/diff/a", memory / "store/.aufsd/staging/1"
    content.mkdir()
    staged.mkdir()
    there = deepen(content)
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o4711, dir_fd=there))
    os.utime(f"/proc/self/fd/{there}", (1, 2))
    await jobs.clone(LayerId("a"), str(staged))
    here = innermost(staged)
    assert os.listdir(here) == ["file"]
    assert os.stat("file", dir_fd=here).st_ino == os.stat("file", dir_fd=there).st_ino
    assert os.fstat(here).st_mtime == 2
    os.close(here)
    os.close(there)


async def test_a_deep_layer_is_labelled(jobs: Jobs, memory: Path) -> None:
    top = memory / "layer"
    top.mkdir()
    here = deepen(top)
    assert await jobs.relabel("layer", str(top), LABEL) == DEEP + 1
    assert os.getxattr(here, XATTR) == LABEL.encode()
    os.close(here)


async def test_a_deep_layer_is_converted_there_and_back(jobs: Jobs, memory: Path) -> None:
    """With a whiteout to rewrite on every level, and aufs's own directories as deep as the rest."""
    content = memory / "store/diff/a"
    orphans = content / ".wh..wh.orph"
    orphans.mkdir(parents=True)
    os.close(deepen(orphans))
    here = os.open(content, os.O_RDONLY)
    for _ in range(DEEP):
        os.close(os.open(".wh.gone", os.O_CREAT | os.O_WRONLY, 0o640, dir_fd=here))
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open(".wh..wh..opq", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    parent = memory / "store/diff/parent"
    parent.mkdir()
    os.close(deepen(parent))
    # each directory is looked for in the parent from where the last one was found
    assert await jobs.convert("a", Dialect.OVERLAY, (Branch("parent", Dialect.AUFS),))
    assert not orphans.exists()
    assert whiteouts.has_opaque_xattr(here, NAMESPACE)
    assert whiteouts.is_whiteout_node(os.stat("../gone", dir_fd=here))
    assert await jobs.convert("a", Dialect.AUFS)
    assert os.listdir(here) == [".wh..wh..opq"]
    assert stat.S_IMODE(os.stat("../.wh.gone", dir_fd=here).st_mode) == 0o640
    os.close(here)


def test_a_wide_layer_is_converted_there_and_back_in_little_memory(memory: Path) -> None:
    top = memory / "layer"
    top.mkdir()
    for number in range(WIDE):
        (top / f".wh.{number}").touch()
    for target in (Dialect.OVERLAY, Dialect.AUFS):
        assert in_child(partial(convert_in_little_memory, top, target)) == 0
        assert len(os.listdir(top)) == WIDE
    assert (top / ".wh.0").exists()


def convert_in_little_memory(top: Path, target: Dialect) -> None:
    fd = os.open(top, os.O_RDONLY)
    tracemalloc.start()
    conversion.convert(fd, target, NAMESPACE, sync=False)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000


def test_the_names_that_a_flush_has_to_link_are_found_in_a_deep_union(memory: Path) -> None:
    top = memory / "union"
    top.mkdir()
    here = deepen(top)
    os.close(os.open("linked", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.link("linked", "again", src_dir_fd=here, dst_dir_fd=here)
    root, inode = os.open(top, os.O_RDONLY), os.stat("linked", dir_fd=here).st_ino
    before = open_descriptors()
    found = []
    for place, name in plink.names(root, {inode}):
        assert os.stat(name, dir_fd=place.fd).st_ino == inode
        assert open_descriptors() - before < 2 * OPEN_AT_MOST
        found.append(name)
    assert sorted(found) == [b"again", b"linked"]
    os.close(root)
    os.close(here)


async def test_a_deep_layer_is_checked_with_few_descriptors(jobs: Jobs, memory: Path) -> None:
    content = memory / "store/diff/a"
    content.mkdir()
    here = deepen(content)
    os.close(os.open(".wh.gone", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.mknod("listed", stat.S_IFCHR, os.makedev(0, 0), dir_fd=here)
    os.setxattr(f"/proc/self/fd/{here}", f"{NAMESPACE}.overlay.redirect", b"/x")
    os.close(here)
    found = await jobs.look_into((Branch("a", Dialect.OVERLAY),))
    assert sorted(each.problem for each in found) == [
        *("listed-whiteout", "mixed-dialects", "stray-xattr"),
    ]
    assert max(len(each.detail) for each in found) < 5000


async def test_in_a_snapshot_the_marks_of_an_overlay_are_content(jobs: Jobs, memory: Path) -> None:
    inner = memory / "store/diff/a/var/lib/docker/overlay2/b/diff"
    inner.mkdir(parents=True)
    os.mknod(inner / "gone", stat.S_IFCHR, os.makedev(0, 0))
    os.setxattr(inner, f"{NAMESPACE}.overlay.opaque", b"y")
    os.setxattr(inner, f"{NAMESPACE}.overlay.redirect", b"/x")
    assert await jobs.look_into((Branch("a", Dialect.NONE),)) == ()
    (inner / ".wh.gone").touch()
    (found,) = await jobs.look_into((Branch("a", Dialect.NONE),))
    # in a tar that would say what it says to aufs
    assert (found.problem, "aufs" in found.detail) == ("mixed-dialects", True)


def test_one_layer_that_cannot_be_read_is_no_reason_not_to_look_at_the_next(memory: Path) -> None:
    root = memory / "store"
    for id in ("a", "b"):
        (root / "diff" / id).mkdir(parents=True)
        (root / "layers").mkdir(exist_ok=True)
        (root / "layers" / id).touch()
    os.close(deepen(root / "diff/a", 40))
    (root / "diff/b" / ("n" * 250)).touch()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with open_offline(str(root), Settings(namespace=NAMESPACE)) as store:
            # enough for a layer without directories, and no more
            free = [os.dup(0) for _ in range(12)]
            room = free[-1] + 1
            for fd in free:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (room, limits[1]))
            before = open_descriptors()
            found = [(each.id, each.problem) for each in store.look_into(["a", "b"])]
            assert open_descriptors() == before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found == [("a", "unreadable"), ("b", "long-name")]


async def test_of_many_problems_the_first_are_named_and_the_rest_counted(
    jobs: Jobs, memory: Path
) -> None:
    content = memory / "store/diff/a"
    content.mkdir()
    for number in range(1000):
        (content / f".wh.{number}").touch()
    found = await jobs.look_into((Branch("a", Dialect.OVERLAY),))
    assert len(found) == 21
    assert found[-1].detail == "and 980 more names"


def test_what_fuse_overlayfs_noted_is_taken_from_a_deep_branch(memory: Path) -> None:
    top = memory / "layer"
    top.mkdir()
    here = deepen(top)
    name = f"{NAMESPACE}.overlay.opaque"
    os.setxattr(here, name, b"y")
    fuse_marks.strip(str(top), NAMESPACE)
    assert name not in os.listxattr(here)
    os.close(here)
