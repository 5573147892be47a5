"""The sockets themselves, who gets in, and how the daemon stops."""

import errno
import os
import resource
import socket
import stat
from pathlib import Path

import pytest
import trio
import trio.testing

from aufsd.rpc.listeners import bind
from aufsd.rpc.server import Allow, ServerSettings
from aufsd_client.address import reachable
from tests.rpc.raw_peer import PATIENCE, RawPeer, code, line, name
from tests.rpc.serving import Connect, Served, start
from tests.strangers import let_in

# --- listening --------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_sockets_have_the_modes_of_the_contract(tmp_path: Path) -> None:
    before = os.umask(0o077)
    control = bind(str(tmp_path / "control"), monitor=False, group="root")
    monitor = bind(str(tmp_path / "monitor"), monitor=True)
    os.umask(before)
    assert (mode(tmp_path / "control"), mode(tmp_path / "monitor")) == (0o660, 0o666)
    control.close()
    monitor.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
def test_the_control_socket_is_the_groups(tmp_path: Path) -> None:
    listener = bind(str(tmp_path / "control"), monitor=False, group="daemon")
    assert (tmp_path / "control").stat().st_gid != 0
    listener.close()


def test_a_group_that_does_not_exist_is_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    listener = bind(str(tmp_path / "control"), monitor=False, group="no-such-group")
    assert "no-such-group" in "".join(capfd.readouterr())
    assert mode(tmp_path / "control") == 0o660
    listener.close()


def test_a_socket_file_that_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    bind(str(path), monitor=True).sock.close()
    listener = bind(str(path), monitor=True)
    RawPeer(path).sock.close()
    listener.close()


def test_one_that_somebody_listens_on_is_not(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    first = bind(str(path), monitor=True)
    with pytest.raises(OSError, match="another process listens") as caught:
        bind(str(path), monitor=True)
    assert caught.value.errno == errno.EADDRINUSE
    RawPeer(path).sock.close()
    first.close()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "sock"
    if kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
    with pytest.raises(FileExistsError):
        bind(str(path), monitor=True)
    assert path.exists()


def test_a_path_may_be_longer_than_an_address_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 100) / ("s" * 80)
    path.parent.mkdir()
    listener = bind(str(path), monitor=True)
    with socket.socket(socket.AF_UNIX) as peer, reachable(str(path)) as short:
        peer.connect(short)
    listener.close()
    assert not path.exists()


def test_a_file_that_another_daemon_put_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    first = bind(str(path), monitor=True)
    os.unlink(path)
    second = bind(str(path), monitor=True)
    first.close()
    RawPeer(path).sock.close()
    second.close()


# --- who gets in ------------------------------------------------------------------------------


async def test_over_the_limit_a_peer_is_told_and_turned_away(
    nursery: trio.Nursery, tmp_path: Path, connect: Connect
) -> None:
    served = await start(nursery, tmp_path, ServerSettings(max_connections=2))
    first, second, third = (connect(served.control) for _ in range(3))
    await first.settle()
    await second.settle()
    answer = await third.receive()
    assert (code(answer), name(answer), answer["id"]) == (-32001, "Overloaded", None)
    assert await third.receive_line() == b""
    await connect(served.monitor).settle()
    first.sock.close()
    with trio.fail_after(PATIENCE):
        while served.server.statistics().connections > 2:
            await trio.testing.wait_all_tasks_blocked()
    await connect(served.control).settle()


async def test_one_that_has_spoken_already_still_reads_why(
    nursery: trio.Nursery, tmp_path: Path, connect: Connect
) -> None:
    served = await start(nursery, tmp_path, ServerSettings(max_connections=1))
    await connect(served.control).settle()
    # sent before the server comes to accept it
    late = connect(served.control)
    late.sock.send(line("ping"))
    assert name(await late.receive()) == "Overloaded"
    assert await late.receive_line() == b"", "an end, and no ECONNRESET"


async def test_accepting_goes_on_after_the_descriptors_ran_out(
    served: Served, connect: Connect
) -> None:
    await connect(served.control).settle()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    late = connect(served.control)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        await trio.testing.wait_all_tasks_blocked()
        assert served.server.statistics().accepted == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await late.settle()


@pytest.mark.parametrize(
    ("method", "params"),
    [("create", {"id": "a"}), ("check", {"repair": True})],
    ids=["create", "check with repair"],
)
@pytest.mark.root
async def test_a_user_that_no_allow_list_names_is_denied(
    nursery: trio.Nursery, tmp_path: Path, method: str, params: dict[str, object]
) -> None:
    served = await start(nursery, tmp_path, ServerSettings(allow={"change": Allow(uids=(12345,))}))
    os.chmod(served.control, 0o666)
    let_in(served.control)
    for uid, allowed in ((12345, True), (12346, False)):
        # the kernel notes who connects, at connect(2)
        os.seteuid(uid)
        try:
            peer = RawPeer(served.control)
        finally:
            os.seteuid(0)
        with peer:
            answer = await peer.ask(method, **params)
            assert ("result" in answer) is allowed
            if not allowed:
                assert (code(answer), name(answer)) == (401, "PermissionDenied")
            assert "result" in await peer.ask("check")


async def test_calls_of_a_user_beyond_its_limit_are_refused(
    nursery: trio.Nursery, tmp_path: Path, connect: Connect
) -> None:
    served = await start(nursery, tmp_path, ServerSettings(max_calls_per_user=1))
    one, other = connect(served.control), connect(served.control)
    await one.send(line("create", id="slow"))
    await served.driver.until_running(1)
    assert name(await other.ask("ping")) == "Overloaded"
    served.driver.go.set()
    assert "result" in await one.receive()
    assert "result" in await other.ask("ping")


# --- stopping ---------------------------------------------------------------------------------


async def ended(served: Served) -> None:
    with trio.fail_after(PATIENCE):
        await served.done.wait()


async def test_an_idle_server_stops_at_once_and_takes_its_sockets_away(
    served: Served, connect: Connect
) -> None:
    peer = connect(served.control)
    await peer.settle()
    served.shutdown.set()
    await ended(served)
    assert await peer.receive_line() == b""
    assert not served.control.exists()
    assert not served.monitor.exists()


async def test_running_calls_end_and_new_ones_are_refused_while_it_drains(
    served: Served, connect: Connect
) -> None:
    peer, other = connect(served.control), connect(served.control)
    await peer.send(line("create", "slow", id="slow"))
    await other.settle()
    await served.driver.until_running(1)
    served.shutdown.set()
    await trio.testing.wait_all_tasks_blocked()
    for asked in (peer, other):
        answer = await asked.ask("ping")
        assert (code(answer), name(answer)) == (-32000, "ShuttingDown")
    with pytest.raises(FileNotFoundError):
        connect(served.control)
    assert not served.done.is_set()
    served.driver.go.set()
    assert "result" in await peer.receive()
    await ended(served)
    assert await peer.receive_line() == b""
    assert served.driver.parents == {"slow": None}


async def test_what_still_runs_at_the_deadline_is_cancelled(
    nursery: trio.Nursery, tmp_path: Path, connect: Connect
) -> None:
    served = await start(nursery, tmp_path, ServerSettings(drain_timeout=0.05))
    peer = connect(served.control)
    await peer.send(line("create", id="slow"))
    await served.driver.until_running(1)
    served.shutdown.set()
    await ended(served)
    assert "create slow cancelled" in served.driver.calls
    assert name(await peer.receive()) == "ShuttingDown"
    assert await peer.receive_line() == b""


async def test_a_peer_that_does_not_read_does_not_hold_up_the_stop(
    nursery: trio.Nursery, tmp_path: Path, connect: Connect
) -> None:
    served = await start(nursery, tmp_path, ServerSettings(drain_timeout=0.05, send_timeout=3600))
    peer = connect(served.control)
    await peer.send(line("rpc.discover") * 40)
    await trio.testing.wait_all_tasks_blocked()
    served.shutdown.set()
    await ended(served)


async def test_a_cancelled_server_leaves_no_sockets(tmp_path: Path, connect: Connect) -> None:
    async with trio.open_nursery() as nursery:
        served = await start(nursery, tmp_path)
        peer = connect(served.control)
        await peer.send(line("create", id="slow"))
        await served.driver.until_running(1)
        nursery.cancel_scope.cancel()
    assert not served.control.exists()
    assert name(await peer.receive()) == "ShuttingDown"
    assert await peer.receive_line() == b""


async def test_every_call_is_observed_with_its_outcome(served: Served, connect: Connect) -> None:
    peer = connect(served.control)
    await peer.ask("ping")
    await peer.ask("get", id="missing")
    await peer.ask("nothing")
    await peer.send(b"garbage\n")
    await peer.receive()
    assert served.observed == [
        ("ping", "ok"),
        ("get", "LayerNotFound"),
        ("unknown", "MethodNotFound"),
        ("unknown", "ParseError"),
    ]
