"""Cancelled at any step, an operation was done or was not: table, disk and kernel say the same."""

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from aufsd.driver import Driver
from aufsd.kernel import mountinfo
from aufsd.store.ids import LayerId
from tests import driving
from tests.driving import BASE, NEW, TOP, apply, create, opened

pytestmark = pytest.mark.service

MOST = 200  # steps, more than any of these takes


class CancelAt(trio.abc.Instrument):
    """Cancels a scope before the n-th step of a task."""

    def __init__(self, task: trio.lowlevel.Task, scope: trio.CancelScope, number: int) -> None:
        self.task, self.scope, self.left = task, scope, number

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.left -= 1
            if not self.left:
                self.scope.cancel()


async def cancelled_at(number: int, operation: Callable[[], Awaitable[object]]) -> bool:
    """Run it, cancelled before its n-th step; whether it came to its end all the same."""
    with trio.CancelScope() as scope:
        instrument = CancelAt(trio.lowlevel.current_task(), scope, number)
        trio.lowlevel.add_instrument(instrument)
        try:
            await operation()
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return not scope.cancelled_caught


@dataclass
class State:
    """What an operation may change, from the three sides."""

    listed: bool
    on_disk: bool
    references: int
    mounted: bool
    content: bytes


def look(driver: Driver, id: LayerId) -> State:
    store, entry = driver.store, driver.active.table.entries.get(id)
    layout = store.layout
    found = [
        os.path.exists(path)
        for path in (layout.parents_file(id), layout.content(id), layout.mount_point(id))
    ]
    assert len(set(found)) == 1, found
    file = Path(layout.content(id), "file")
    return State(
        store.exists(id),
        found[0],
        len(entry.references) if entry else 0,
        found[0] and mountinfo.is_mount_point(layout.mount_point(id)),
        file.read_bytes() if file.exists() else b"",
    )


def assert_settled(driver: Driver) -> None:
    """Table, disk and kernel agree, and nothing is under way."""
    table = driver.active.table
    for id in (BASE, TOP, NEW):
        assert table.in_transition(id) is None
        state = look(driver, id)
        assert state.listed == state.on_disk
        entry = table.entries.get(id)
        assert state.mounted == bool(entry and entry.mounted)
        assert not table.is_read(id)
    assert os.listdir(driver.store.layout.staging) == []
    assert driver.jobs.running() == []


async def nothing(driver: Driver, tmp_path: Path) -> None:
    """No preparation."""


async def one_get(driver: Driver, tmp_path: Path) -> None:
    await driving.get(driver, TOP)


async def make_new(driver: Driver, tmp_path: Path) -> None:
    await create(driver, NEW, BASE)


async def do_get(driver: Driver, tmp_path: Path) -> None:
    await driving.get(driver, TOP)


async def do_put(driver: Driver, tmp_path: Path) -> None:
    await driving.put(driver, TOP)


async def do_create(driver: Driver, tmp_path: Path) -> None:
    await create(driver, NEW, BASE)


async def do_remove(driver: Driver, tmp_path: Path) -> None:
    await driver.remove(NEW, force=False)


async def do_remove_by_force(driver: Driver, tmp_path: Path) -> None:
    await driver.remove(TOP, force=True)


async def do_apply(driver: Driver, tmp_path: Path) -> None:
    await apply(driver, tmp_path, b"new")


async def do_diff(driver: Driver, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        await driver.diff(TOP, parent=None, out=out.fileno(), digest=False)


Act = Callable[[Driver, Path], Awaitable[None]]


@pytest.mark.parametrize(
    ("ready", "operation", "id"),
    [
        (nothing, do_get, TOP),
        (one_get, do_get, TOP),
        (one_get, do_put, TOP),
        (nothing, do_create, NEW),
        (make_new, do_remove, NEW),
        (one_get, do_remove_by_force, TOP),
        (nothing, do_apply, TOP),
        (nothing, do_diff, TOP),
    ],
)
async def test_cancelled_at_any_step_all_sides_agree(
    ready: Act, operation: Act, id: LayerId, tmp_path: Path
) -> None:
    for number in range(1, MOST):
        directory = tmp_path / str(number)
        directory.mkdir()
        async with opened(directory) as driver:
            await ready(driver, directory)
            before = look(driver, id)
            done = await cancelled_at(number, lambda: operation(driver, directory))  # noqa: B023
            # children that were killed are gone when the call ends; nothing is waited for
            assert_settled(driver)
            after = look(driver, id)
            if not done and after != before:
                # cut off on its way out, or between an unmount and a removal
                assert operation in (do_put, do_remove, do_remove_by_force, do_apply, do_create)
                assert after.mounted is False
        if done:
            return
    pytest.fail(f"not done within {MOST} steps")
