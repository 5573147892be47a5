"""The Trio client: what is its own; that it has the same methods is the document's test."""

import inspect
from pathlib import Path

import pytest
import trio
import trio.testing

import aufsd_client.trio
from aufsd.rpc.server import ServerSettings
from aufsd_client import Client as BlockingClient
from aufsd_client import ConnectionLost, DaemonUnreachable, awaited, results
from aufsd_client.errors import LayerExists, Overloaded
from aufsd_client.trio import Client
from tests.rpc.fake_driver import TAR
from tests.rpc.raw_peer import PATIENCE
from tests.rpc.serving import Served, start


def public(kind: type) -> dict[str, list[str]]:
    return {
        name: list(inspect.signature(function).parameters)
        for name, function in vars(kind).items()
        if not name.startswith("_") and callable(function)
    }


def test_both_clients_have_the_same_methods_and_parameters() -> None:
    assert public(awaited.Client) == public(BlockingClient)


async def test_calls_give_results_and_raise_errors(served: Served) -> None:
    async with Client(served.control) as client:
        assert await client.create("a") == results.Created([])
        assert (await client.get("a", hold="process")).path == "/mnt/a"
        with pytest.raises(LayerExists):
            await client.create("a")
        assert [row.id async for row in client.iter_layers()] == ["a"]
        assert len([change async for change in client.iter_changes("a")]) == 6
        assert (await client.discover())["openrpc"]
    assert served.server.statistics().accepted == 1


async def test_streams_go_both_ways(served: Served, tmp_path: Path) -> None:
    served.driver.parents["a"] = None
    async with Client(served.control) as client:
        found = bytearray()
        assert (await client.diff("a", found)).size == len(TAR)
        assert found == TAR
        await client.diff("a", tmp_path / "tar")
        assert (await client.apply_diff("a", tmp_path / "tar")).size == len(TAR)
        assert served.driver.applied == {"a": TAR}


async def test_calls_of_many_tasks_run_side_by_side(served: Served) -> None:
    async with Client(served.control) as client, trio.open_nursery() as nursery:
        for n in range(30):
            nursery.start_soon(client.create, f"slow{n}")
        await served.driver.until_running(30)
        await client.create("fast")
        served.driver.go.set()
    assert len(served.driver.parents) == 31


async def test_a_cancelled_diff_is_cancelled_in_the_daemon(served: Served) -> None:
    served.driver.parents["slow"] = None
    async with Client(served.control) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.diff, "slow", bytearray())
            await served.driver.until_running(1)
            nursery.cancel_scope.cancel()
        await served.driver.until_running(0)
        assert "diff slow cancelled" in served.driver.calls
        await client.ping()


async def test_any_other_cancelled_call_is_carried_out(served: Served) -> None:
    async with Client(served.control) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.create, "slow")
            await served.driver.until_running(1)
            nursery.cancel_scope.cancel()
        await client.ping()
        await trio.testing.wait_all_tasks_blocked()
        assert served.driver.running == 1
        served.driver.go.set()
        await served.driver.until_running(0)
    assert "slow" in served.driver.parents


async def test_mounted_puts_also_when_it_is_cancelled(served: Served) -> None:
    served.driver.parents["a"] = None
    async with Client(served.control) as client:
        with trio.CancelScope() as scope:
            async with client.mounted("a") as path:
                assert path == "/mnt/a"
                scope.cancel()
                await trio.sleep_forever()
    assert served.driver.counts == {"a": 0}


async def test_it_says_when_there_is_no_daemon(tmp_path: Path) -> None:
    async with Client(tmp_path / "none") as client:
        with pytest.raises(DaemonUnreachable):
            await client.ping()


async def test_it_says_when_the_daemon_is_full(nursery: trio.Nursery, tmp_path: Path) -> None:
    served = await start(nursery, tmp_path, ServerSettings(max_connections=1))
    async with Client(served.control) as one, Client(served.control) as other:
        await one.ping()
        with pytest.raises(Overloaded):
            await other.ping()


async def test_it_says_when_the_daemon_ends_amid_a_call(served: Served, tmp_path: Path) -> None:
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(tmp_path / "other"))
    listener.listen()

    async def hang_up() -> None:
        peer, _ = await listener.accept()
        await peer.recv(100)
        peer.close()

    async with Client(tmp_path / "other") as client, trio.open_nursery() as nursery:
        nursery.start_soon(hang_up)
        with pytest.raises(ConnectionLost):
            await client.get("a")
    listener.close()


async def test_an_idle_connection_whose_daemon_has_ended_is_not_used(tmp_path: Path) -> None:
    async with Client(tmp_path / "aufsd.sock") as client:
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                await start(nursery, tmp_path)
                with trio.fail_after(PATIENCE):
                    await client.ping()
                nursery.cancel_scope.cancel()


async def test_a_closed_client_says_so(served: Served) -> None:
    client = aufsd_client.trio.Client(served.control)
    await client.ping()
    client.close()
    with pytest.raises(trio.ClosedResourceError):
        await client.ping()
