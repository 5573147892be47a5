"""aufs on a file system that takes no more: hard links that cannot be made are not lost."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from aufsd.kernel import syscalls
from aufsd.union import plink
from aufsd.union.backend import NotFlushed, Union
from aufsd.union.choice import PROBES
from aufsd.union.overlay import Overlay
from tests.conformance.layers import Layers, open_layers
from tests.small import broken_at_will, full, small

pytestmark = [pytest.mark.mounts, pytest.mark.aufs]

NAMES = [f"name{number:02}" for number in range(20)]


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Layers]:
    """An empty store served by aufs, on a small file system of its own."""
    with small(tmp_path / "disk") as disk, open_layers("aufs", f"{disk}/store") as opened:
        yield opened


@pytest.fixture
def written(layers: Layers) -> Union:
    """A mounted layer in which one of 21 names of a file of its parent was written."""
    base = layers.add({"first": "old"})
    for name in NAMES:
        os.link(f"{layers.content(base)}/first", f"{layers.content(base)}/{name}")
    top = layers.add()
    # a mount of its own, so that a test can make it read-only under the union
    syscalls.mount(layers.content(top), layers.content(top), "", syscalls.MS_BIND)
    union = layers.mount(top, base)
    Path(union.target, "first").write_text("new")
    return union


@contextmanager
def full_disk(union: Union) -> Iterator[None]:
    with full(union.top):
        yield


@contextmanager
def read_only(union: Union) -> Iterator[None]:
    flags = syscalls.MS_REMOUNT | syscalls.MS_BIND
    syscalls.mount("none", union.top, "", flags | syscalls.MS_RDONLY)
    try:
        yield
    finally:
        syscalls.mount("none", union.top, "", flags)


Trouble = Callable[[Union], AbstractContextManager[None]]
TROUBLE = pytest.mark.parametrize(
    ("trouble", "number"),
    [(full_disk, errno.ENOSPC), (read_only, errno.EROFS)],
    ids=["full disk", "read-only disk"],
)


def contents(union: Union) -> set[str]:
    return {Path(union.target, name).read_text() for name in ("first", *NAMES)}


@TROUBLE
def test_a_union_with_hard_links_that_cannot_be_made_stays_mounted(
    trouble: Trouble, number: int, layers: Layers, written: Union
) -> None:
    """Unmounted, all twenty would go back to their old content."""
    with trouble(written):
        with pytest.raises(NotFlushed) as caught:
            layers.backend.unmount(written.target)
        assert (caught.value.error.errno, caught.value.count) == (number, 20)
        assert sorted(caught.value.names) == [f"/{name}" for name in NAMES]
        assert layers.backend.is_mounted(written.target)
    assert contents(written) == {"new"}
    layers.backend.unmount(written.target)
    assert not layers.backend.is_mounted(written.target)
    layers.backend.mount(written)
    assert contents(written) == {"new"}


@TROUBLE
def test_a_flush_that_fails_says_so(
    trouble: Trouble, number: int, layers: Layers, written: Union
) -> None:
    with trouble(written), pytest.raises(NotFlushed) as caught:
        layers.backend.flush(written.target)
    assert caught.value.error.errno == number
    layers.backend.flush(written.target)
    assert {Path(written.top, name).read_text() for name in NAMES} == {"new"}


def test_nothing_is_unmounted_when_the_file_system_broke(tmp_path: Path) -> None:
    """ext4 turns itself read-only after an error."""
    with broken_at_will(tmp_path) as (disk, break_it), open_layers("aufs", f"{disk}/store") as made:
        base = made.add({"first": "old"})
        os.link(f"{made.content(base)}/first", f"{made.content(base)}/second")
        union = made.mount(made.add(), base)
        Path(union.target, "first").write_text("new")
        break_it()
        with pytest.raises(NotFlushed) as caught:
            made.backend.unmount(union.target)
        assert (caught.value.error.errno, caught.value.names) == (errno.EROFS, ("/second",))
        assert made.backend.is_mounted(union.target)
        # what there is can be copied out
        assert Path(union.target, "first").read_text() == "new"


def test_as_many_links_are_made_as_there_is_room_for(layers: Layers, written: Union) -> None:
    """They are not lost if the machine stops before there is more."""
    with full(written.top, but=5), pytest.raises(NotFlushed) as caught:
        layers.backend.unmount(written.target)
    made = {name for name in NAMES if Path(written.top, name).exists()}
    assert len(made) == 5
    assert caught.value.count == 15
    assert set(caught.value.names) == {f"/{name}" for name in set(NAMES) - made}


def test_a_name_in_a_directory_that_cannot_be_made_is_named(layers: Layers) -> None:
    """The directory has to be copied up first."""
    base = layers.add({"first": "old", "deep/er/": ""})
    os.link(f"{layers.content(base)}/first", f"{layers.content(base)}/deep/er/second")
    union = layers.mount(layers.add(), base)
    Path(union.target, "first").write_text("new")
    with full(union.top), pytest.raises(NotFlushed) as caught:
        layers.backend.unmount(union.target)
    assert caught.value.names == ("/deep/er/second",)


@TROUBLE
def test_what_is_to_be_removed_is_unmounted_without_a_flush(
    trouble: Trouble, number: int, layers: Layers, written: Union
) -> None:
    """Or a full disk could not be made less full by the removal of layers."""
    with trouble(written):
        layers.backend.unmount(written.target, flush=False)
    assert not layers.backend.is_mounted(written.target)


def test_without_a_hard_link_a_full_disk_keeps_nothing_mounted(layers: Layers) -> None:
    union = layers.mount(layers.add(), layers.add({"a": "old"}))
    Path(union.target, "a").write_text("new")
    with full(union.top):
        layers.backend.unmount(union.target)
    assert not layers.backend.is_mounted(union.target)


def test_the_overlay_backend_keeps_a_union_of_aufs_that_cannot_be_flushed(
    layers: Layers, written: Union
) -> None:
    overlay = PROBES["overlay"](layers.layout)
    assert isinstance(overlay, Overlay)
    with full(written.top), pytest.raises(NotFlushed):
        overlay.unmount(written.target)
    assert contents(written) == {"new"}
    overlay.unmount(written.target)
    assert os.listdir(f"{written.top}/{plink.DIRECTORY}") == []
