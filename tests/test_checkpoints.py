"""A checkpoint of a mounted layer where the host gives out, between its unmount and its mount."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from aufsd.active import performing
from aufsd.driver import Driver
from aufsd.store import replacing
from aufsd.store.ids import LayerId
from aufsd.tasks import SOONEST
from aufsd_client.errors import AufsdError, LayerDamaged, LimitExceeded, MountFailed
from tests.driving import BASE, NEW, TOP, get, opened, put

pytestmark = pytest.mark.trio


@contextmanager
def descriptors(spare: int) -> Iterator[None]:
    """Let this process open so many descriptors more than it has."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # the limit is on the number: none below the highest stays free
    highest = max(map(int, os.listdir("/proc/self/fd")))
    filler = [os.dup(0)]
    while filler[-1] < highest:
        filler.append(os.dup(0))
    try:
        most = max([highest, *filler]) + 1 + spare
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in filler:
            os.close(fd)


def row(driver: Driver) -> tuple[bool, int]:
    """What the table says of the layer: whether it is mounted, and its references."""
    (found,) = [each for each in driver.mounts().mounts if each.id == TOP]
    return found.mounted, found.references


def remounts(driver: Driver) -> str:
    (check,) = [each for each in driver.health().checks if each.name == "remounts"]
    return check.status


async def test_without_descriptors_it_is_done_or_nothing_has_happened(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver:
        path = Path((await get(driver, TOP)).path)
        (path / "new").write_text("new")
        refused: list[AufsdError] = []
        short = 0
        for spare in range(200):
            try:
                with descriptors(spare):
                    await driver.checkpoint(TOP, below=NEW)
                break
            except AufsdError as error:
                refused.append(error)
            except OSError as error:
                # met before anything is done; a caller is told Overloaded (rpc/faults.py)
                if error.errno != errno.EMFILE:
                    raise
                short += 1
            assert (os.path.ismount(path), *row(driver)) == (True, True, 1)
            assert not driver.exists(NEW).exists
            assert (path / "new").read_text() == "new"
        else:
            raise AssertionError("it was never done")
        assert len(refused) + short > 5
        assert [one for one in refused if not isinstance(one, LimitExceeded | MountFailed)] == []
        assert (os.path.ismount(path), *row(driver)) == (True, True, 1)
        assert (path / "new").read_text() == "new"
        await put(driver, TOP)


def failing(times: int, real: Callable[..., object]) -> Callable[..., object]:
    """Fails so many times, then does what it is to do."""

    def call(*args: object, **options: object) -> object:
        nonlocal times
        times -= 1
        if times >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **options)

    return call


async def test_a_mount_that_fails_once_brings_the_old_state_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as driver:
        path = Path((await get(driver, TOP)).path)
        (path / "new").write_text("new")
        monkeypatch.setattr(performing, "mount", failing(1, performing.mount))
        with pytest.raises(LayerDamaged):
            await driver.checkpoint(TOP, below=NEW)
        assert (os.path.ismount(path), *row(driver)) == (True, True, 1)
        assert (path / "new").read_text() == "new"
        assert not driver.exists(NEW).exists
        assert remounts(driver) == "ok"
        await driver.checkpoint(TOP, below=NEW)
        await put(driver, TOP)


async def test_what_can_be_neither_done_nor_undone_is_told_and_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as driver:
        path = Path((await get(driver, TOP)).path)
        (path / "new").write_text("new")
        # the mount after the commit, and that of the old state
        monkeypatch.setattr(performing, "mount", failing(3, performing.mount))
        with pytest.raises(LayerDamaged):
            await driver.checkpoint(TOP, below=NEW)
        assert (os.path.ismount(path), *row(driver)) == (False, False, 1)
        assert (await driver.get_metadata(TOP)).metadata["mounted"] == "false"
        assert remounts(driver) == "degraded"
        with trio.fail_after(20 * SOONEST):
            while row(driver) != (True, 1):
                await trio.sleep(0.02)
        assert (path / "new").read_text() == "new"
        assert remounts(driver) == "ok"
        await put(driver, TOP)


async def test_a_get_does_not_wait_for_what_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as driver:
        path = Path((await get(driver, TOP)).path)
        monkeypatch.setattr(performing, "mount", failing(2, performing.mount))
        with pytest.raises(LayerDamaged):
            await driver.checkpoint(TOP, below=NEW)
        assert (await get(driver, TOP)).references == 2
        assert (os.path.ismount(path), *row(driver)) == (True, True, 2)
        await trio.sleep(2 * SOONEST)
        assert row(driver) == (True, 2)
        await put(driver, TOP)
        await put(driver, TOP)


async def test_a_start_makes_up_for_what_the_last_daemon_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as driver:
        path = Path((await get(driver, TOP)).path)
        monkeypatch.setattr(performing, "mount", failing(2, performing.mount))
        with pytest.raises(LayerDamaged):
            await driver.checkpoint(TOP, below=NEW)
        journal = (tmp_path / "run").glob("*")
        kept = {each: each.read_bytes() for each in journal if each.is_file()}
    assert not os.path.ismount(path)
    for each, data in kept.items():
        each.write_bytes(data)
    # at the start too, once
    monkeypatch.setattr(performing, "mount", failing(1, performing.mount))
    async with opened(tmp_path, made=True) as driver:
        assert row(driver) == (False, 1)
        with trio.fail_after(20 * SOONEST):
            while row(driver) != (True, 1):
                await trio.sleep(0.02)
        await put(driver, TOP)


@pytest.mark.parametrize("mounted", [True, False])
async def test_a_layer_between_two_states_is_finished(
    mounted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as driver:
        if mounted:
            path = Path((await get(driver, TOP)).path)
            (path / "new").write_text("new")
        steps = iter([True, *[False] * 4])
        real = replacing._rename

        def rename(source: str, target: str) -> None:
            if not next(steps, True):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(source, target)

        monkeypatch.setattr(replacing, "_rename", rename)
        with pytest.raises(LayerDamaged):
            await driver.checkpoint(TOP, below=NEW)
        with trio.fail_after(20 * SOONEST):
            while remounts(driver) != "ok":
                await trio.sleep(0.02)
        # forwards, which is what a restart would have done
        assert (await driver.get_metadata(TOP)).metadata["parents"] == f"{NEW} {BASE}"
        if mounted:
            assert (path / "new").read_text() == "new"
            await put(driver, TOP)
        assert (await driver.check(id=None, deep=True, repair=False)).problems == []
        await driver.remove(TOP, force=False)
        await driver.remove(LayerId(NEW), force=False)
