"""Work in the mount thread: its result comes back, and a cancellation never loses one."""

import resource
import threading

import pytest
import trio
import trio.testing

from aufsd.threads import EVENTFDS_KEPT, MountThread


async def test_results_and_errors_come_back_in_order() -> None:
    thread = MountThread()
    assert await thread.run(max, 3, 5) == 5
    with pytest.raises(ZeroDivisionError):
        await thread.run(divmod, 1, 0)
    assert await thread.run(threading.get_ident) == await thread.run(threading.get_ident)
    assert thread.calls == 4
    thread.close()


async def test_what_has_begun_is_waited_for_and_its_result_is_returned() -> None:
    thread = MountThread()
    begun, go_on = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        go_on.wait()
        return "done"

    found = []
    with trio.CancelScope() as scope:

        async def call() -> None:
            found.append(await thread.run(work))
            with pytest.raises(trio.Cancelled):
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.to_thread.run_sync(begun.wait)
            scope.cancel()
            with trio.CancelScope(shield=True):
                # it waits on, though it was told to stop
                await trio.testing.wait_all_tasks_blocked()
            assert found == []
            go_on.set()
    assert found == ["done"]
    thread.close()


async def test_what_was_cancelled_in_the_queue_is_never_called() -> None:
    thread = MountThread()
    begun, go_on = threading.Event(), threading.Event()
    called: list[str] = []

    def block() -> None:
        begun.set()
        go_on.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(thread.run, block)
        await trio.to_thread.run_sync(begun.wait)
        async with trio.open_nursery() as waiting:
            waiting.start_soon(thread.run, called.append, "cancelled")
            await trio.testing.wait_all_tasks_blocked()
            assert thread.queued == 1
            waiting.cancel_scope.cancel()
        go_on.set()
    await thread.run(called.append, "next")
    assert called == ["next"]
    thread.close()


async def test_without_a_descriptor_left_it_does_its_work_all_the_same() -> None:
    thread = MountThread()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    at_once, go_on = EVENTFDS_KEPT + 3, threading.Event()
    answers = []

    def work(number: int) -> int:
        go_on.wait()
        return number

    async def call(number: int) -> None:
        answers.append(await thread.run(work, number))

    # below what is open already, no more can be
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        async with trio.open_nursery() as nursery:
            for number in range(at_once):
                nursery.start_soon(call, number)
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        # a cancelled one is never called here either
        with trio.CancelScope() as scope:
            scope.cancel()
            await thread.run(answers.append, -1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(answers) == list(range(at_once))
    thread.close()
