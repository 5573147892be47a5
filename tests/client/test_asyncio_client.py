"""The asyncio client: what differs is how it waits, so that is what is tested."""

import asyncio
from pathlib import Path

import pytest

from aufsd_client import DaemonUnreachable, results
from aufsd_client.asyncio import Client
from aufsd_client.errors import LayerExists
from tests.client.threaded import Daemon
from tests.rpc.fake_driver import TAR


async def until(daemon: Daemon, running: int) -> None:
    """Until so many calls are inside the driver, which another thread has."""
    while daemon.do(lambda: daemon.driver.running) != running:
        await asyncio.sleep(0)


def test_calls_give_results_and_raise_errors(daemon: Daemon) -> None:
    async def act() -> None:
        async with Client(daemon.path) as client:
            assert await client.create("a") == results.Created([])
            with pytest.raises(LayerExists):
                await client.create("a")
            assert [row.id async for row in client.iter_layers()] == ["a"]
            async with client.mounted("a") as path:
                assert path == "/mnt/a"
            assert (await client.discover())["openrpc"]
        with pytest.raises(RuntimeError, match="closed"):
            await client.ping()

    asyncio.run(act())
    assert daemon.driver.counts == {"a": 0}


def test_streams_go_both_ways(daemon: Daemon, tmp_path: Path) -> None:
    daemon.driver.parents["a"] = None

    async def act() -> None:
        async with Client(daemon.path) as client:
            await client.diff("a", tmp_path / "tar")
            await client.apply_diff("a", tmp_path / "tar")

    asyncio.run(act())
    assert daemon.driver.applied == {"a": TAR}


def test_calls_of_many_tasks_run_side_by_side(daemon: Daemon) -> None:
    async def act() -> None:
        async with Client(daemon.path) as client, asyncio.TaskGroup() as group:
            for n in range(30):
                group.create_task(client.create(f"slow{n}"))  # type: ignore[arg-type]
            await until(daemon, 30)
            await client.create("fast")
            daemon.do(daemon.driver.go.set)

    asyncio.run(act())
    assert len(daemon.driver.parents) == 31


def test_a_cancelled_diff_is_cancelled_in_the_daemon(daemon: Daemon) -> None:
    daemon.driver.parents["slow"] = None

    async def act() -> None:
        async with Client(daemon.path) as client:
            call = asyncio.ensure_future(client.diff("slow", bytearray()))
            await until(daemon, 1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await until(daemon, 0)
            # the next call has a connection of its own
            await client.ping()

    asyncio.run(act())
    assert "diff slow cancelled" in daemon.driver.calls


def test_a_cancelled_block_puts_what_it_got(daemon: Daemon) -> None:
    daemon.driver.parents["a"] = None

    async def act() -> None:
        async with Client(daemon.path) as client:
            inside = asyncio.Event()

            async def hold() -> None:
                async with client.mounted("a"):
                    inside.set()
                    await asyncio.Event().wait()

            task = asyncio.ensure_future(hold())
            await inside.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(act())
    assert daemon.driver.counts == {"a": 0}


def test_no_daemon_is_told(tmp_path: Path) -> None:
    async def act() -> None:
        async with Client(tmp_path / "none") as client:
            await client.ping()

    with pytest.raises(DaemonUnreachable):
        asyncio.run(act())
