"""A coroutine runs up to its first wait at once, and what is left of it is awaited as ever."""

import pytest
import trio

from aufsd.rpc.stepping import first_step


async def test_one_that_never_waits_has_ended() -> None:
    done: list[str] = []

    async def work() -> None:
        done.append("done")

    assert first_step(work()) is None
    assert done == ["done"]


async def test_one_that_waits_goes_on_when_the_rest_is_awaited() -> None:
    done: list[int] = []

    async def work() -> None:
        for each in range(3):
            done.append(each)
            await trio.lowlevel.checkpoint()

    rest = first_step(work())
    assert rest is not None
    assert done == [0]
    await rest
    assert done == [0, 1, 2]


async def test_what_it_raises_is_raised_at_once() -> None:
    async def fail() -> None:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        first_step(fail())


async def test_what_it_raises_later_is_raised_by_the_rest() -> None:
    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise LookupError("gone")

    rest = first_step(fail())
    assert rest is not None
    with pytest.raises(LookupError, match="gone") as caught:
        await rest
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
        rest = first_step(work())
        assert rest is not None
        scope.cancel()
        await rest
    assert scope.cancelled_caught
    assert seen == ["cleaned up"]


async def test_it_stays_in_the_task_that_awaits_it() -> None:
    tasks: list[trio.lowlevel.Task] = []

    async def work() -> None:
        tasks.append(trio.lowlevel.current_task())
        await trio.lowlevel.checkpoint()
        tasks.append(trio.lowlevel.current_task())

    rest = first_step(work())
    assert rest is not None
    await rest
    assert tasks == [trio.lowlevel.current_task()] * 2
