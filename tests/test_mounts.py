"""The table over real overlay mounts: counts follow the kernel, whatever happens to the mounts."""

import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import trio

from aufsd.active import clearing, journal
from aufsd.active.journal import Journal
from aufsd.active.mounts import Mounts
from aufsd.active.opening import open_mounts
from aufsd.active.refs import Entry, Reference
from aufsd.active.statedir import JOURNAL, Owner, open_state_dir
from aufsd.active.table import Table
from aufsd.archive.fork import ForkServer
from aufsd.archive.jobs import Jobs
from aufsd.archive.requests import Settings
from aufsd.kernel import mountinfo, probe, syscalls
from aufsd.kernel.peer import process
from aufsd.layers.access import Access
from aufsd.layers.background import Upkeep
from aufsd.layers.branches import Chains
from aufsd.layers.directories import Directories
from aufsd.store import creation
from aufsd.store import dialect as dialects
from aufsd.store.dialect import Dialect, XattrNamespace
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.store.opening import open_store
from aufsd.tasks import Tasks
from aufsd.threads import Disk
from aufsd.union import overlay, runner
from aufsd.union.backend import Backend, Union
from aufsd_client.errors import (
    LabelConflict,
    LayerDamaged,
    LayerHasChildren,
    LayerInUse,
    LayerNotFound,
    MountFailed,
    ParentNotFound,
    UnmountBusy,
)

pytestmark = pytest.mark.mounts

NAMESPACE: XattrNamespace = "user" if probe.in_user_namespace() else "trusted"
BASE, TOP, SIDE = LayerId("base"), LayerId("top"), LayerId("side")
MANUAL = Reference(1, 0, "test", "manual", 0.0, 0)


async def get(mounts: Mounts, id: LayerId, reference: Reference, *, label: str) -> Entry:
    """As the driver does it; branches are made in the backend's dialect here, so no job runs."""
    store, table, disk = mounts.store, mounts.table, Disk()
    one = trio.CapacityLimiter(1)
    jobs = Jobs(store.layout, Settings(), 0, one, one, ForkServer("/nowhere"))
    upkeep = Upkeep(store, table, jobs, disk, [], Tasks())
    chains = Chains(store, mounts.backend, table, disk, upkeep, "never")
    content = Directories(store, mounts.backend, table, jobs, disk, chains, upkeep.deletion_due)
    return await Access(mounts, chains, content, disk).get(id, reference, label=label)


@asynccontextmanager
async def opened(
    tmp_path: Path,
    *,
    serve: Callable[[Backend], Backend] = lambda found: found,
    tasks: Tasks | None = None,
) -> AsyncIterator[Mounts]:
    """A store, its mounts, and what the journal says; mounts stay when it is left.

    `serve` gives the backend in the place of the one that was found.
    """
    root = tmp_path / "store"
    root.mkdir(exist_ok=True)
    store = open_store(str(root), adopt=False, xattr_namespace=NAMESPACE)
    state = open_state_dir(str(tmp_path), str(root))
    owner = Owner(store.format.id, store.layout.root)
    try:
        backend = overlay.probe(store.layout)
        assert isinstance(backend, overlay.Overlay), backend
        recorded = journal.read(state, owner).table
        table = Table(store, Journal(state, owner, recorded))
        async with open_mounts(table, serve(backend), recorded, tasks or Tasks()) as mounts:
            yield mounts
        table.journal.close()
    finally:
        state.close()
        store.close()


@pytest.fixture
async def mounts(tmp_path: Path) -> AsyncIterator[Mounts]:
    """Layers `base`, and `top` and `side` on it."""
    async with opened(tmp_path) as made:
        for id, parents in ((BASE, ()), (TOP, (BASE,)), (SIDE, (BASE,))):
            make(made.store, id, *parents)
        Path(made.store.layout.content(BASE), "lower").write_text("x")
        yield made
        await clearing.cleanup(made)


def make(store: Store, id: LayerId, *parents: LayerId) -> None:
    store.register(id, parents[0] if parents else None)
    xattrs = dialects.xattrs(Dialect.OVERLAY, store.xattr_namespace)
    creation.create_on_disk(store, id, parents, xattrs)


def spoil(content: str) -> None:
    """Put a file where a branch lies, of which mount(2) makes ENOTDIR; the branch is at .away."""
    os.rename(content, f"{content}.away")
    Path(content).touch()
    for name, value in dialects.xattrs(Dialect.OVERLAY, NAMESPACE).items():
        os.setxattr(content, name, value)


def is_mounted(mounts: Mounts, id: LayerId) -> bool:
    return mountinfo.is_mount_point(mounts.store.layout.mount_point(id))


def count(mounts: Mounts, id: LayerId) -> int:
    entry = mounts.table.entries.get(id)
    return len(entry.references) if entry else 0


async def test_the_first_get_mounts_and_the_last_put_unmounts(mounts: Mounts) -> None:
    for expected in (1, 2, 3):
        entry = await get(mounts, TOP, MANUAL, label="")
        assert len(entry.references) == expected
        assert is_mounted(mounts, TOP)
    assert Path(mounts.store.layout.mount_point(TOP), "lower").read_text() == "x"
    for expected in (2, 1):
        left = (await mounts.put(TOP, pid=1)).entry
        assert left is not None
        assert len(left.references) == expected
        assert is_mounted(mounts, TOP)
    assert (await mounts.put(TOP, pid=1)).entry is None
    assert not is_mounted(mounts, TOP)
    assert (await mounts.put(TOP, pid=1)).entry is None  # one too many is harmless


async def test_a_layer_without_parents_counts_and_is_not_mounted(mounts: Mounts) -> None:
    lone = LayerId("lone")
    make(mounts.store, lone)
    entry = await get(mounts, lone, MANUAL, label="")
    assert (entry.mounted, entry.read_only) == (False, False)
    assert not is_mounted(mounts, lone)
    assert (await mounts.put(lone, pid=1)).entry is None
    assert lone not in mounts.table.entries


async def test_a_layer_without_parents_on_which_others_stand_is_shown_read_only(
    mounts: Mounts,
) -> None:
    for label in ("", "system_u:object_r:any_t:s0"):  # it has none of its own
        entry = await get(mounts, BASE, MANUAL, label=label)
        assert (entry.mounted, entry.read_only, entry.backend) == (True, True, "bind")
    shown = Path(mounts.store.layout.mount_point(BASE))
    assert (shown / "lower").read_text() == "x"
    with pytest.raises(OSError, match="Read-only"):
        (shown / "new").touch()
    # what is mounted inside does not turn up in the content
    Path(mounts.store.layout.content(BASE), "d").mkdir()
    syscalls.mount("tmpfs", str(shown / "d"), "tmpfs", 0, "size=64k")
    assert not mountinfo.is_mount_point(f"{mounts.store.layout.content(BASE)}/d")
    syscalls.umount2(str(shown / "d"))
    assert await mounts.put(BASE, pid=1)
    assert (await mounts.put(BASE, pid=1)).entry is None
    assert not is_mounted(mounts, BASE)


async def test_who_was_given_a_base_layer_to_write_keeps_it_when_a_child_comes(
    mounts: Mounts,
) -> None:
    lone = LayerId("lone")
    make(mounts.store, lone)
    assert not (await get(mounts, lone, MANUAL, label="")).read_only
    make(mounts.store, LayerId("child"), lone)
    second = await get(mounts, lone, MANUAL, label="")
    assert (second.mounted, second.read_only, len(second.references)) == (False, False, 2)
    for _ in range(2):
        await mounts.put(lone, pid=1)
    third = await get(mounts, lone, MANUAL, label="")
    assert (third.mounted, third.read_only, len(third.references)) == (True, True, 1)


def mount_a_stranger(tmp_path: Path, target: str) -> None:
    """An overlay that is not the layer's, as somebody else might mount."""
    for name in ("lower", "upper", "work"):
        (tmp_path / "foreign" / name).mkdir(parents=True, exist_ok=True)
    at = tmp_path / "foreign"
    Path(at, "lower", "FOREIGN").touch()
    data = f"lowerdir={at}/lower,upperdir={at}/upper,workdir={at}/work"
    if NAMESPACE == "user":
        data += ",userxattr"
    syscalls.mount("none", target, "overlay", 0, data)


async def test_another_overlay_in_the_place_of_the_union_is_not_the_layer(
    mounts: Mounts, tmp_path: Path
) -> None:
    await get(mounts, TOP, MANUAL, label="")
    target = mounts.store.layout.mount_point(TOP)
    syscalls.umount2(target)
    mount_a_stranger(tmp_path, target)
    assert mounts.get_now(TOP, MANUAL, label="") is None
    with pytest.raises(MountFailed, match="did not mount"):
        await get(mounts, TOP, MANUAL, label="")
    assert count(mounts, TOP) == 1, "the reference stands"
    # nor is it taken down with the last reference, by force, or by cleanup
    assert (await mounts.put(TOP, pid=1)).entry is None
    with pytest.raises(UnmountBusy, match="did not mount"):
        async with clearing.removing(mounts, TOP, force=True):
            pytest.fail("a layer was given away with something mounted at its mount point")
    done, failed = await clearing.cleanup(mounts)
    assert (done, list(failed)) == ([], [TOP])
    assert os.listdir(target) == ["FOREIGN"]
    syscalls.umount2(target)
    assert len((await get(mounts, TOP, MANUAL, label="")).references) == 1


async def test_what_lies_over_a_union_is_named_and_stays(mounts: Mounts) -> None:
    await get(mounts, TOP, MANUAL, label="")
    target = mounts.store.layout.mount_point(TOP)
    syscalls.mount("tmpfs", target, "tmpfs", 0, "size=64k")
    with pytest.raises(MountFailed, match="did not mount"):
        await get(mounts, TOP, MANUAL, label="")
    with pytest.raises(UnmountBusy, match="tmpfs that aufsd did not mount is mounted over it"):
        await mounts.put(TOP, pid=1)
    assert mounts.table.busy() == [TOP]
    done, failed = await clearing.cleanup(mounts)
    assert (done, list(failed)) == ([], [TOP])
    assert [row.fstype for row in mountinfo.mounted_under(target)] == ["overlay", "tmpfs"]
    syscalls.umount2(target)
    assert (await mounts.put(TOP, pid=1)).entry is None
    assert not is_mounted(mounts, TOP)


@pytest.mark.parametrize("journal_is", ["there", "lost"])
async def test_at_start_a_stranger_is_not_taken_for_the_union(
    tmp_path: Path, journal_is: str
) -> None:
    async with opened(tmp_path) as first:
        make(first.store, BASE)
        for id in (TOP, SIDE, LayerId("covered")):
            make(first.store, id, BASE)
            await get(first, id, MANUAL, label="")
        layout = first.store.layout
    syscalls.umount2(layout.mount_point(TOP))
    mount_a_stranger(tmp_path, layout.mount_point(TOP))
    syscalls.mount("tmpfs", layout.mount_point(LayerId("covered")), "tmpfs", 0, "size=64k")
    if journal_is == "lost":
        os.unlink(tmp_path / JOURNAL)
    async with opened(tmp_path) as second:
        assert TOP not in second.table.entries
        assert second.counters.differences["foreign"] >= 1
        with pytest.raises(MountFailed, match="did not mount"):
            await get(second, TOP, MANUAL, label="")
        assert count(second, SIDE) == 1
        assert count(second, LayerId("covered")) == (1 if journal_is == "there" else 0)
        for id in (TOP, LayerId("covered")):
            syscalls.umount2(layout.mount_point(id))
        await clearing.cleanup(second)
        assert mountinfo.mounted_under(layout.mnt) == []


async def test_another_overlay_is_told_also_with_a_mount_inside(tmp_path: Path) -> None:
    async with opened(tmp_path) as first:
        make(first.store, BASE)
        make(first.store, TOP, BASE)
        content, target = first.store.layout.content(TOP), first.store.layout.mount_point(TOP)
    for name in ("lower/inside", "work"):
        (tmp_path / "foreign" / name).mkdir(parents=True)
    # the layer's own content on top, over somebody else's
    data = f"lowerdir={tmp_path}/foreign/lower,upperdir={content},workdir={tmp_path}/store/work"
    (tmp_path / "store" / "work").mkdir()
    syscalls.mount("none", target, "overlay", 0, data + (",userxattr" * (NAMESPACE == "user")))
    syscalls.mount("none", f"{target}/inside", "tmpfs", 0, "size=64k")
    async with opened(tmp_path) as second:
        assert TOP not in second.table.entries
        assert second.counters.differences["foreign"] == 1
    syscalls.umount2(f"{target}/inside")
    syscalls.umount2(target)


@dataclass(frozen=True)
class Broken:
    """The overlay backend, but that TOP is mounted in part, and SIDE not looked at until mended."""

    overlay: Backend
    mended: list[bool] = field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        return getattr(self.overlay, name)

    def is_part(self, union: Union) -> bool:
        if union.id == SIDE and not self.mended:
            raise RuntimeError("a fault of aufsd")
        return union.id == TOP


async def test_a_layer_that_cannot_be_settled_ends_no_start_and_is_settled_later(
    tmp_path: Path,
) -> None:
    ids = (TOP, SIDE, LayerId("sound"))
    async with opened(tmp_path) as first:
        make(first.store, BASE)
        for id in ids:
            make(first.store, id, BASE)
            await get(first, id, MANUAL, label="")
        layout = first.store.layout
    for id in (TOP, SIDE):
        forget(tmp_path / JOURNAL, id)
    tasks, broken = Tasks(), None

    def serve(found: Backend) -> Backend:
        nonlocal broken
        broken = Broken(found)
        return cast(Backend, broken)

    inside = os.open(layout.mount_point(TOP), os.O_PATH)
    try:
        async with opened(tmp_path, serve=serve, tasks=tasks) as second:
            assert count(second, LayerId("sound")) == 1
            told = next(check for check in tasks.checks() if check.name == "replay")
            assert told.status == "degraded"
            assert "busy" in told.detail
            assert "a fault of aufsd" in told.detail
            assert is_mounted(second, TOP)
            os.close(inside)
            inside = -1
            assert isinstance(broken, Broken)
            broken.mended.append(True)
            with trio.fail_after(30):
                while next(c for c in tasks.checks() if c.name == "replay").status != "ok":
                    await trio.sleep(0.01)
            # nobody was given what was there in part; of the other one somebody may have been
            assert (count(second, TOP), count(second, SIDE)) == (0, 1)
            assert not is_mounted(second, TOP)
            await clearing.cleanup(second)
    finally:
        if inside >= 0:
            os.close(inside)


def forget(book: Path, id: LayerId) -> None:
    """Take the lines of a layer out of the journal."""
    lines = book.read_bytes().splitlines(keepends=True)
    book.write_bytes(b"".join(line for line in lines if f'"id":"{id}"'.encode() not in line))


async def test_a_damaged_layer_that_is_mounted_is_counted_and_not_removed_under_its_users(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as first:
        make(first.store, BASE)
        for id in (TOP, SIDE):
            make(first.store, id, BASE)
            await get(first, id, MANUAL, label="")
        layout = first.store.layout
    Path(layout.parents_file(TOP)).write_text("")
    os.unlink(layout.parents_file(SIDE))
    async with opened(tmp_path) as second:
        assert TOP in second.store.damaged
        assert count(second, TOP) == 1
        with pytest.raises(LayerInUse):
            async with clearing.removing(second, TOP, force=False):
                pytest.fail("given away under who uses it")
        # that of the layer that is gone goes too
        done, failed = await clearing.cleanup(second)
        assert (done, failed) == ([SIDE, TOP], {})
        assert mountinfo.mounted_under(layout.mnt) == []
        assert second.table.entries == {}


async def test_cleanup_drops_what_is_counted_of_a_mount_that_vanished(mounts: Mounts) -> None:
    await get(mounts, TOP, MANUAL, label="")
    syscalls.umount2(mounts.store.layout.mount_point(TOP))
    assert await clearing.cleanup(mounts) == ([], {})
    assert TOP not in mounts.table.entries


async def test_an_unknown_layer_is_no_path(mounts: Mounts) -> None:
    with pytest.raises(LayerNotFound):
        await get(mounts, LayerId("nosuch"), MANUAL, label="")
    assert (await mounts.put(LayerId("nosuch"), pid=1)).entry is None


async def test_a_mount_that_fails_leaves_no_count_and_no_mount(mounts: Mounts) -> None:
    content = mounts.store.layout.content(BASE)
    spoil(content)
    for _ in range(2):  # moby's second Get returned the unmounted directory as a success (B1)
        with pytest.raises(LayerDamaged):
            await get(mounts, TOP, MANUAL, label="")
        assert TOP not in mounts.table.entries
        assert not is_mounted(mounts, TOP)
    os.unlink(content)
    os.rename(f"{content}.away", content)
    await get(mounts, TOP, MANUAL, label="")
    assert count(mounts, TOP) == 1


async def test_a_remount_that_fails_leaves_the_count_as_it_was(mounts: Mounts) -> None:
    await get(mounts, TOP, MANUAL, label="")
    await get(mounts, TOP, MANUAL, label="")
    syscalls.umount2(mounts.store.layout.mount_point(TOP))
    content = mounts.store.layout.content(BASE)
    spoil(content)
    with pytest.raises(LayerDamaged):
        await get(mounts, TOP, MANUAL, label="")
    assert count(mounts, TOP) == 2
    os.unlink(content)
    os.rename(f"{content}.away", content)


async def test_an_unmount_from_outside_is_noticed_and_the_references_stand(mounts: Mounts) -> None:
    await get(mounts, TOP, MANUAL, label="")
    syscalls.umount2(mounts.store.layout.mount_point(TOP))
    entry = await get(mounts, TOP, MANUAL, label="")
    assert len(entry.references) == 2
    assert is_mounted(mounts, TOP)
    syscalls.umount2(mounts.store.layout.mount_point(TOP))
    await mounts.put(TOP, pid=1)
    assert (await mounts.put(TOP, pid=1)).entry is None


@dataclass(frozen=True)
class Fleeting:
    """The overlay backend, whose next mounts somebody else takes away at once: one for each row.

    True: before the backend has seen that it stands.
    """

    overlay: Backend
    taken: list[bool]

    def __getattr__(self, name: str) -> object:
        return getattr(self.overlay, name)

    def mount(self, union: Union) -> None:
        self.overlay.mount(union)
        if self.taken:
            syscalls.umount2(union.target)
            if self.taken.pop():
                raise runner.Vanished("unmounted")


@pytest.mark.parametrize(("times", "stands"), [(2, True), (3, False)])
async def test_a_mount_that_others_take_away_at_once_is_made_again_or_is_none(
    times: int, stands: bool, tmp_path: Path
) -> None:
    def serve(found: Backend) -> Backend:
        return cast(Backend, Fleeting(found, [True, False, True][:times]))

    async with opened(tmp_path, serve=serve) as mounts:
        make(mounts.store, BASE)
        make(mounts.store, TOP, BASE)
        make(mounts.store, SIDE, TOP)
        with suppress(MountFailed):
            # and says what is true of the one that stands
            assert (await get(mounts, TOP, MANUAL, label="")).read_only
        assert is_mounted(mounts, TOP) is stands
        assert count(mounts, TOP) == int(stands)
        await clearing.cleanup(mounts)


async def test_something_foreign_on_the_mount_point_is_not_taken_for_the_union(
    mounts: Mounts,
) -> None:
    target = mounts.store.layout.mount_point(TOP)
    syscalls.mount("tmpfs", target, "tmpfs", 0, "size=64k")
    with pytest.raises(MountFailed, match="did not mount"):
        await get(mounts, TOP, MANUAL, label="")
    assert count(mounts, TOP) == 0
    syscalls.umount2(target)


async def test_a_layer_with_children_is_mounted_read_only(mounts: Mounts) -> None:
    make(mounts.store, LayerId("child"), TOP, BASE)
    entry = await get(mounts, TOP, MANUAL, label="")
    assert entry.read_only
    with pytest.raises(OSError, match="Read-only"):
        Path(mounts.store.layout.mount_point(TOP), "new").touch()
    assert (await get(mounts, SIDE, MANUAL, label="")).read_only is False


async def test_a_busy_mount_stays_without_a_reference_and_its_holder_is_named(
    mounts: Mounts,
) -> None:
    await get(mounts, TOP, MANUAL, label="")
    target = mounts.store.layout.mount_point(TOP)
    with subprocess.Popen(["sleep", "60"], cwd=target) as holder:
        with pytest.raises(UnmountBusy) as caught:
            await mounts.put(TOP, pid=1)
        assert is_mounted(mounts, TOP)
        assert count(mounts, TOP) == 0
        assert mounts.table.busy() == [TOP]
        holders = caught.value.data["holders"]
        assert isinstance(holders, list)
        assert {"pid": holder.pid, "comm": "sleep", "uses": ["cwd"]} in holders
        holder.kill()
    assert (await mounts.put(TOP, pid=1)).entry is None
    assert not is_mounted(mounts, TOP)


async def test_a_busy_mount_can_be_got_again(mounts: Mounts) -> None:
    await get(mounts, TOP, MANUAL, label="")
    with open(f"{mounts.store.layout.mount_point(TOP)}/lower") as _:
        with pytest.raises(UnmountBusy):
            await mounts.put(TOP, pid=1)
        assert len((await get(mounts, TOP, MANUAL, label="")).references) == 1
    assert (await mounts.put(TOP, pid=1)).entry is None


async def test_another_label_while_it_is_mounted_is_refused(mounts: Mounts) -> None:
    await get(mounts, TOP, MANUAL, label="")
    with pytest.raises(LabelConflict):
        await get(mounts, TOP, MANUAL, label="system_u:object_r:container_file_t:s0")
    assert count(mounts, TOP) == 1


async def test_references_of_a_process_go_when_it_ends(mounts: Mounts) -> None:
    with subprocess.Popen(["sleep", "60"]) as holder:
        comm, start = process(holder.pid)
        held = Reference(holder.pid, 0, comm, "process", 0.0, start)
        await get(mounts, TOP, held, label="")
        await get(mounts, TOP, held, label="")
        await get(mounts, SIDE, MANUAL, label="")
        await get(mounts, SIDE, held, label="")
        with pytest.raises(LayerInUse):  # it is not ours to put
            await mounts.put(TOP, pid=1)
        holder.kill()
    with trio.fail_after(10):
        while TOP in mounts.table.entries or count(mounts, SIDE) == 2:
            await trio.sleep(0.01)
    assert not is_mounted(mounts, TOP)
    assert count(mounts, SIDE) == 1


async def test_many_at_once_mount_once_and_count_right(mounts: Mounts) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(lambda: get(mounts, TOP, MANUAL, label=""))
    assert count(mounts, TOP) == 50
    assert mounts.counters.mounts == 1
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(lambda: mounts.put(TOP, pid=1))
    assert mounts.counters.unmounts == 1
    assert not is_mounted(mounts, TOP)


async def test_a_cancelled_get_counts_nothing_and_leaves_nothing_mounted(mounts: Mounts) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await get(mounts, TOP, MANUAL, label="")
    assert scope.cancelled_caught
    assert TOP not in mounts.table.entries
    assert not is_mounted(mounts, TOP)
    assert mounts.table.in_transition(TOP) is None


async def test_remove_waits_for_nobody_and_refuses_what_is_used(mounts: Mounts) -> None:
    await get(mounts, TOP, MANUAL, label="")
    with pytest.raises(LayerInUse):
        async with clearing.removing(mounts, TOP, force=False):
            pytest.fail("a referenced layer was given away")
    with pytest.raises(LayerHasChildren):
        async with clearing.removing(mounts, BASE, force=True):
            pytest.fail("a parent was given away")
    async with clearing.removing(mounts, TOP, force=True):
        assert not is_mounted(mounts, TOP)
    assert TOP not in mounts.table.entries


async def test_content_below_a_mount_cannot_be_changed(mounts: Mounts) -> None:
    await get(mounts, TOP, MANUAL, label="")
    for id in (TOP, BASE):
        with pytest.raises(LayerInUse):
            async with mounts.table.changing(id):
                pytest.fail("content under a live union was given away")
    async with mounts.table.changing(SIDE):
        pass


async def test_a_get_waits_for_a_change_below_and_for_nothing_else(mounts: Mounts) -> None:
    order: list[str] = []

    async def got(id: LayerId) -> None:
        await get(mounts, id, MANUAL, label="")
        order.append(id)

    make(mounts.store, LayerId("lone"))
    make(mounts.store, LayerId("other"), LayerId("lone"))
    async with trio.open_nursery() as nursery, mounts.table.changing(BASE):
        nursery.start_soon(got, TOP)
        await got(LayerId("other"))
        order.append("changed")
    assert order == ["other", "changed", TOP]


async def test_what_is_read_is_not_changed(mounts: Mounts) -> None:
    async with mounts.table.reading(lambda: ((TOP, BASE),)):
        with pytest.raises(LayerInUse):
            async with mounts.table.changing(BASE):
                pytest.fail("a layer that is read was given away")
        async with mounts.table.reading(lambda: ((BASE,),)):
            pass
        await get(mounts, TOP, MANUAL, label="")
    await mounts.put(TOP, pid=1)
    async with mounts.table.changing(BASE):
        pass


async def test_a_parent_cannot_go_while_a_child_is_made(mounts: Mounts) -> None:
    async with mounts.table.creating(LayerId("child"), SIDE):
        with pytest.raises(LayerHasChildren):
            async with clearing.removing(mounts, SIDE, force=True):
                pytest.fail("a parent was given away")
    with pytest.raises(ParentNotFound):
        async with mounts.table.creating(LayerId("new"), LayerId("nosuch")):
            pytest.fail("made on nothing")
    with pytest.raises(RuntimeError):
        async with mounts.table.creating(LayerId("new"), None):
            raise RuntimeError
    assert not mounts.store.exists(LayerId("new"))


async def test_cleanup_unmounts_everything_whatever_its_count(mounts: Mounts) -> None:
    for _ in range(3):
        await get(mounts, TOP, MANUAL, label="")
    await get(mounts, SIDE, MANUAL, label="")
    with open(f"{mounts.store.layout.mount_point(SIDE)}/lower") as _:
        done, failed = await clearing.cleanup(mounts)
    assert done == [TOP]
    assert list(failed) == [SIDE]
    assert mounts.table.busy() == [SIDE]


async def test_counts_and_mounts_survive_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as first:
        make(first.store, BASE)
        make(first.store, LayerId("lone"))
        await get(first, LayerId("lone"), MANUAL, label="")
        for id in (TOP, SIDE, LayerId("gone"), LayerId("new")):
            make(first.store, id, BASE)
        await get(first, TOP, MANUAL, label="")
        await get(first, TOP, MANUAL, label="")
        await get(first, BASE, MANUAL, label="")
        await get(first, LayerId("gone"), MANUAL, label="")
        union = first.table.union(LayerId("new"), first.table.entries[TOP])
        layout = first.store.layout
    # while nobody serves: one is unmounted, one is mounted
    syscalls.umount2(layout.mount_point(LayerId("gone")))
    async with opened(tmp_path) as second:
        second.backend.mount(union)
    async with opened(tmp_path) as third:
        assert count(third, TOP) == 2
        assert count(third, BASE) == count(third, LayerId("lone")) == 1
        await third.put(BASE, pid=1)
        assert LayerId("gone") not in third.table.entries
        assert count(third, LayerId("new")) == 1
        await third.put(TOP, pid=1)
        assert (await third.put(TOP, pid=1)).entry is None
        assert (await third.put(LayerId("new"), pid=1)).entry is None
        assert mountinfo.mounted_under(layout.mnt) == []


async def test_a_process_that_ended_while_nobody_served_is_put_at_start(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as holder:
        async with opened(tmp_path) as first:
            make(first.store, BASE)
            make(first.store, TOP, BASE)
            comm, start = process(holder.pid)
            held = Reference(holder.pid, 0, comm, "process", 0.0, start)
            await get(first, TOP, held, label="")
        holder.kill()
    async with opened(tmp_path) as second:
        with trio.fail_after(10):
            while TOP in second.table.entries:
                await trio.sleep(0.01)
        assert not is_mounted(second, TOP)


async def test_calls_of_one_tick_ask_the_kernel_once_and_later_ones_ask_again(
    mounts: Mounts,
) -> None:
    table = mounts.table
    await get(mounts, TOP, MANUAL, label="")
    with table.tick:
        await get(mounts, TOP, MANUAL, label="")
        # after both calls had arrived
        syscalls.umount2(mounts.store.layout.mount_point(TOP))
        entry = await get(mounts, TOP, MANUAL, label="")
        assert len(entry.references) == 3
        assert len(table.tick.buffered) == 2
    assert len(table.tick.buffered) == 0
    assert mounts.counters.vanished_mounts == 0
    entry = await get(mounts, TOP, MANUAL, label="")
    assert len(entry.references) == 4
    assert mounts.counters.vanished_mounts == 1
    assert mountinfo.is_mount_point(mounts.store.layout.mount_point(TOP))


async def test_what_is_counted_already_is_counted_without_waiting(mounts: Mounts) -> None:
    assert mounts.get_now(TOP, MANUAL, label="") is None, "it is not mounted"
    await get(mounts, TOP, MANUAL, label="")
    second = mounts.get_now(TOP, MANUAL, label="")
    assert second is not None
    assert len(second.references) == 2
    with pytest.raises(LabelConflict):
        mounts.get_now(TOP, MANUAL, label="other")
    left = mounts.put_now(TOP, pid=1)
    assert left is not None
    assert len(left.references) == 1
    assert mounts.put_now(TOP, pid=1) is None, "the last one has to unmount"
    assert len(mounts.table.entries[TOP].references) == 1
    with pytest.raises(LayerNotFound):
        mounts.get_now(LayerId("none"), MANUAL, label="")
    assert mounts.put_now(LayerId("none"), pid=1) is None


async def test_a_mount_that_vanished_is_not_counted_without_waiting(mounts: Mounts) -> None:
    await get(mounts, TOP, MANUAL, label="")
    syscalls.umount2(mounts.store.layout.mount_point(TOP), syscalls.MNT_DETACH)
    assert mounts.get_now(TOP, MANUAL, label="") is None
    assert len((await get(mounts, TOP, MANUAL, label="")).references) == 2
