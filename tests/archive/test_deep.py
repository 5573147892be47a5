"""Layers deeper than paths, recursion and descriptors go: copied, converted, labelled, stripped."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from aufsd.archive.jobs import Jobs, open_jobs
from aufsd.archive.relabel import XATTR
from aufsd.archive.requests import Limits
from aufsd.store import dialect as marks
from aufsd.store.dialect import Dialect
from aufsd.store.ids import LayerId
from aufsd.store.layout import Layout
from aufsd.union import fuse
from tests.archive.converting import convert
from tests.archive.shelf import NAMESPACE
from tests.trees import DEEP, deepen, in_memory

pytestmark = pytest.mark.mounts

LABEL = "system_u:object_r:container_file_t:s0"
WIDE = 100_000


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


def test_a_wide_layer_is_converted_there_and_back(memory: Path) -> None:
    top = memory / "layer"
    top.mkdir()
    for number in range(WIDE):
        (top / f".wh.{number}").touch()
    assert convert(top, Dialect.OVERLAY) == 0
    assert len(os.listdir(top)) == WIDE
    assert marks.is_whiteout_node(os.lstat(top / "0"))
    assert convert(top, Dialect.AUFS) == 0
    assert len(os.listdir(top)) == WIDE
    assert (top / ".wh.0").exists()


def test_what_fuse_overlayfs_noted_is_taken_from_a_deep_branch(memory: Path) -> None:
    top = memory / "layer"
    top.mkdir()
    here = deepen(top)
    name = f"{NAMESPACE}.overlay.opaque"
    os.setxattr(here, name, b"y")
    fuse.strip(str(top), NAMESPACE)
    assert name not in os.listxattr(here)
    os.close(here)
