"""A coroutine is awaited as ever, and its first wait is told."""

from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import trio

from aufsd.rpc.stepping import watched


async def at_once(done: list[str]) -> None:
    done.append("done")


async def after_waits(done: list[str]) -> None:
    for _ in range(3):
        await trio.lowlevel.checkpoint()
    done.append("done")


@pytest.mark.parametrize(("work", "waits"), [(at_once, False), (after_waits, True)])
async def test_the_first_wait_is_told_and_only_that(
    work: Callable[[list[str]], Coroutine[Any, Any, None]], waits: bool
) -> None:
    done: list[str] = []
    told: list[list[str]] = []
    assert await watched(work(done), lambda: told.append(done.copy())) is waits
    assert done == ["done"]
    assert told == ([[]] if waits else [])


@pytest.mark.parametrize("waits", [False, True])
async def test_what_it_raises_is_raised(waits: bool) -> None:
    async def fail() -> None:
        if waits:
            await trio.lowlevel.checkpoint()
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone") as caught:
        await watched(fail(), lambda: None)
    assert caught.value.__context__ is None


async def test_a_cancellation_reaches_it_and_it_may_clean_up() -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            seen.append("cleaned up")

    with trio.CancelScope() as scope:
        await watched(work(), scope.cancel)
    assert scope.cancelled_caught
    assert seen == ["cleaned up"]


async def test_it_stays_in_the_task_that_awaits_it() -> None:
    tasks: list[trio.lowlevel.Task] = []

    async def work() -> None:
        tasks.append(trio.lowlevel.current_task())
        await trio.lowlevel.checkpoint()
        tasks.append(trio.lowlevel.current_task())

    await watched(work(), lambda: None)
    assert tasks == [trio.lowlevel.current_task()] * 2
