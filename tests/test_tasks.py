"""Background work: what fails is told, tried again, and ends nothing."""

import errno
import os
from itertools import pairwise

import pytest
import trio
import trio.testing

from aufsd.tasks import LATEST, AutoResetEvent, Task, Tasks
from aufsd_client.errors import LayerDamaged


async def repeated(
    task: Task, failures: list[Exception | None], event: AutoResetEvent
) -> list[float]:
    """When each piece of a task began, which raises these in turn and then waits for good."""
    began: list[float] = []

    async def piece() -> None:
        began.append(trio.current_time())
        if not failures:
            await trio.sleep_forever()
        if failure := failures.pop(0):
            raise failure

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: task.repeat(piece, wake=event.wait))
        event.set()
        with trio.move_on_after(1000):
            while failures:
                await trio.sleep(1)
        nursery.cancel_scope.cancel()
    return began


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files (EMFILE)"),
        (PermissionError(errno.EPERM, "No", "/a/b"), "/a/b: No (EPERM)"),
        (LayerDamaged("layer x is odd"), "layer x is odd"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (MemoryError(), "MemoryError: "),
        (ExceptionGroup("two", [ValueError("a"), ExceptionGroup("", [LayerDamaged("b")])]), None),
    ],
)
async def test_whatever_a_piece_raises_is_told_and_tried_again(
    failure: Exception, said: str | None, autojump_clock: trio.testing.MockClock
) -> None:
    tasks = Tasks()
    task = tasks.add("sweeping", "all is swept")
    found = []

    async def piece() -> None:
        found.append(tasks.checks()[0])
        if len(found) < 3:
            raise failure

    await task.until_done(piece)
    fine, failing, again = found
    assert (fine.name, fine.status, fine.detail) == ("sweeping", "ok", "all is swept")
    assert failing == again
    assert (failing.status, failing.detail) == ("degraded", said or "ValueError: a; b")
    assert tasks.checks() == [fine]


async def test_the_pause_doubles_and_begins_anew_after_a_success(
    autojump_clock: trio.testing.MockClock,
) -> None:
    event = AutoResetEvent()
    failures: list[Exception | None] = [OSError(5, "x") for _ in range(12)]
    began = await repeated(Task("t", ""), [*failures, None], event)
    pauses = [later - earlier for earlier, later in pairwise(began)]
    assert pauses[:4] == [0.25, 0.5, 1, 2]
    assert pauses[-1] == LATEST


async def test_a_bell_cuts_the_pause_short(autojump_clock: trio.testing.MockClock) -> None:
    event = AutoResetEvent()
    task = Task("t", "")
    tries = 0

    async def piece() -> None:
        nonlocal tries
        tries += 1
        raise OSError(errno.EIO, "x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: task.repeat(piece, wake=event.wait))
        for expected in range(1, 20):
            event.set()
            await trio.testing.wait_all_tasks_blocked()
            assert tries == expected
        nursery.cancel_scope.cancel()


async def test_a_cancellation_ends_it_also_beside_a_failure() -> None:
    task = Task("t", "")

    async def fails_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise OSError(errno.EIO, "while it was cancelled")

    async def piece() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails_when_cancelled)
            nursery.start_soon(trio.sleep_forever)

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task.repeat, piece)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert list(task.failing.values()) == ["while it was cancelled (EIO)"]


async def test_pieces_with_keys_fail_beside_each_other() -> None:
    task = Task("t", "")

    async def fail() -> None:
        raise OSError(errno.EIO, "x")

    for key in range(7):
        assert not await task.tried(fail, key)
    assert task.check().detail.count("x (EIO)") == 5
    assert task.check().detail.endswith("; and 2 more")
    for key in range(7):
        assert await task.tried(trio.lowlevel.checkpoint, key)
    assert task.check().status == "ok"
