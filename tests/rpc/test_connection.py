"""One connection: framing, concurrency, limits, and peers that go away or do not read."""

import errno
import json
import os
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from aufsd.rpc.server import ServerSettings
from aufsd_client.errors import InternalError, UnmountBusy
from aufsd_client.wire import MAX_LINE
from tests.rpc.raw_peer import PATIENCE, RawPeer, code, line, name, notification
from tests.rpc.serving import Connect, Served, start


async def dropped(served: Served, reason: str) -> None:
    """Wait until a peer was dropped for this reason."""
    with trio.fail_after(PATIENCE):
        while not served.server.statistics().dropped.get(reason):
            await trio.testing.wait_all_tasks_blocked()


async def refusal(peer: RawPeer, data: bytes) -> int | None:
    """Send it again and again, until the socket takes no more; the error then."""
    while True:
        try:
            peer.sock.send(data)
        except OSError as error:
            return error.errno
        await trio.testing.wait_all_tasks_blocked()


async def test_a_call_may_come_byte_by_byte(served: Served, connect: Connect) -> None:
    peer = connect(served.control)
    for byte in line("exists", id="ü"):
        await peer.send(bytes([byte]))
        await trio.testing.wait_all_tasks_blocked()
    assert name(await peer.receive()) == "InvalidLayerId"


async def test_many_calls_may_come_in_one_piece(served: Served, connect: Connect) -> None:
    peer = connect(served.control)
    await peer.send(b"".join(line("ping", n) for n in range(200)))
    answers = [await peer.receive() for _ in range(200)]
    assert sorted(answer["id"] for answer in answers) == list(range(200))


@pytest.mark.parametrize(
    "garbage",
    [b"", b" ", b"hello", b"{", b'"\xff"', b"\x00", b"[" * 100_000, b"1" + b"0" * 5000, b"NaN"],
    ids=lambda text: repr(text[:8]),
)
async def test_garbage_is_a_parse_error_and_the_connection_goes_on(
    served: Served, connect: Connect, garbage: bytes
) -> None:
    peer = connect(served.control)
    await peer.send(garbage + b"\n")
    answer = await peer.receive()
    assert (code(answer), answer["id"]) == (-32700, None)
    await peer.settle()


async def test_a_line_of_one_mebibyte_is_taken(served: Served, connect: Connect) -> None:
    peer = connect(served.control)
    call = line("exists", id="x" * MAX_LINE)
    call = line("exists", id="x" * (2 * MAX_LINE - len(call) + 1))
    assert len(call) == MAX_LINE + 1, "the newline is not counted"
    await peer.send(call)
    assert name(await peer.receive()) == "InvalidLayerId"
    await peer.settle()


@pytest.mark.parametrize("length", [MAX_LINE + 1, 2 * MAX_LINE])
async def test_a_longer_line_is_an_invalid_request_and_ends_the_connection(
    served: Served, connect: Connect, length: int
) -> None:
    peer = connect(served.control)
    # all of it can be sent before anything is read
    await peer.send(line("create", id="before") + b" " * length + b"\n" + line("ping"))
    assert "result" in await peer.receive()
    answer = await peer.receive()
    assert (code(answer), answer["id"]) == (-32600, None)
    assert await peer.receive_line() == b""
    assert served.server.statistics().dropped == {"overlong": 1}
    assert (await connect(served.control).ask("ping"))["result"] == {}


async def test_a_last_line_without_its_newline_is_not_carried_out(
    served: Served, connect: Connect
) -> None:
    peer = connect(served.control)
    await peer.send(line("create", id="cut").rstrip())
    peer.sock.shutdown(socket.SHUT_WR)
    assert code(await peer.receive()) == -32700
    assert await peer.receive_line() == b""
    assert served.driver.calls == []


async def test_answers_come_as_the_calls_finish(served: Served, connect: Connect) -> None:
    peer = connect(served.control)
    await peer.send(line("create", "slow", id="slow") + line("create", "fast", id="fast"))
    assert (await peer.receive())["id"] == "fast"
    served.driver.go.set()
    assert (await peer.receive())["id"] == "slow"


async def test_a_slow_batch_does_not_hold_up_other_calls(served: Served, connect: Connect) -> None:
    peer = connect(served.control)
    batch = [json.loads(line("create", id=id)) for id in ("slow", "after")]
    await peer.send(json.dumps(batch).encode() + b"\n" + line("create", id="other"))
    assert "result" in await peer.receive()
    assert "create after" not in served.driver.calls
    served.driver.go.set()
    assert len(await peer.receive()) == 2


async def test_at_64_calls_in_flight_the_connection_is_not_read_until_one_ends(
    served: Served, connect: Connect
) -> None:
    peer, other = connect(served.control), connect(served.control)
    await peer.send(b"".join(line("create", n, id=f"slow{n}") for n in range(63)))
    await served.driver.until_running(63)
    await peer.settle()
    await peer.send(line("create", 63, id="slow63") + line("ping", "later"))
    await served.driver.until_running(64)
    # what is sent now stays in the socket, until that is full
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    assert await refusal(peer, notification("ping") * 50) == errno.EAGAIN
    await other.settle()
    assert not peer.has_answer()
    served.driver.go.set()
    ids = {(await peer.receive())["id"] for _ in range(65)}
    assert ids == {*range(64), "later"}


async def test_lines_that_were_read_beyond_the_limit_are_begun_as_calls_end(
    served: Served, connect: Connect
) -> None:
    peer = connect(served.control)
    await peer.send(b"".join(line("create", n, id=f"slow{n}") for n in range(100)))
    await served.driver.until_running(64)
    await trio.testing.wait_all_tasks_blocked()
    assert served.driver.running == 64
    served.driver.go.set()
    assert {(await peer.receive())["id"] for _ in range(100)} == set(range(100))


async def test_peers_take_turns_line_by_line(served: Served, connect: Connect) -> None:
    many, one = connect(served.control), connect(served.control)
    await many.settle()
    await one.settle()
    served.observed.clear()
    # both before the server looks
    many.sock.send(notification("ping") * 1000)
    one.sock.send(line("version") * 5)
    for _ in range(5):
        await one.receive()
    assert [method for method, _ in served.observed].index("version") < 10
    assert len(served.observed) < 100


async def test_a_fault_of_ours_ends_the_connection_that_it_was_met_on_and_no_other(
    nursery: trio.Nursery, tmp_path: Path, connect: Connect
) -> None:
    def observe(method: str, outcome: str, seconds: float) -> None:
        if method in ("version", "create"):
            raise RuntimeError("a fault")

    served = await start(nursery, tmp_path, observe=observe)
    other = connect(served.control)
    for request, after in (
        (line("version"), b""),
        (line("version"), line("create", id="after")),
        (line("create", id="slow"), line("create", id="slower")),
    ):
        peer = connect(served.control)
        await peer.send(request + after)
        await other.settle()
        served.driver.go.set()
        while await peer.receive_line():
            pass
        await other.settle()
    assert served.server.statistics().connections == 1
    assert served.server.statistics().in_flight == 0


async def test_a_peer_that_has_sent_all_may_wait_for_its_answers(
    served: Served, connect: Connect
) -> None:
    peer = connect(served.control)
    served.driver.parents["slow"] = None
    r, w = os.pipe()
    with open(r, "rb") as reader:
        await peer.send(line("create", "c", id="slow-one") + line("diff", "d", id="slow", fd=0), w)
        os.close(w)
        peer.sock.shutdown(socket.SHUT_WR)
        await served.driver.until_running(2)
        await trio.testing.wait_all_tasks_blocked()
        served.driver.go.set()
        answers = [await peer.receive(), await peer.receive()]
        assert {answer["id"] for answer in answers} == {"c", "d"}
        assert all("result" in answer for answer in answers)
        assert await peer.receive_line() == b""
        assert reader.read()


@pytest.mark.parametrize("half_closed", [False, True], ids=["at once", "half first"])
@pytest.mark.parametrize("full", [False, True], ids=["", "while it is not read"])
async def test_when_a_peer_goes_away_its_streams_are_cancelled_and_all_else_runs_to_its_end(
    served: Served, connect: Connect, full: bool, half_closed: bool
) -> None:
    served.driver.parents |= {"slow": None, "slow-in": None}
    peer = connect(served.control)
    r, w = os.pipe()
    calls = [line("create", n, id=f"slow{n}") for n in range(62 if full else 1)]
    await peer.send(line("diff", "out", id="slow", fd=0), w)
    await peer.send(line("apply_diff", "in", id="slow-in", fd=0) + b"".join(calls), r)
    os.close(r)
    os.close(w)
    await served.driver.until_running(2 + len(calls))
    if half_closed:
        peer.sock.shutdown(socket.SHUT_WR)
        await trio.testing.wait_all_tasks_blocked()
        assert served.driver.running == 2 + len(calls)
    peer.sock.close()
    await served.driver.until_running(len(calls))
    assert {"diff slow cancelled", "apply_diff slow-in cancelled"} < set(served.driver.calls)
    assert ("diff", "cancelled") in served.observed
    served.driver.go.set()
    await served.driver.until_running(0)
    assert len(served.driver.parents) == 2 + len(calls)


async def test_what_a_peer_sent_before_it_went_away_is_carried_out(
    served: Served, connect: Connect
) -> None:
    served.driver.parents["slow"] = None
    peer = connect(served.control)
    r, w = os.pipe()
    created = [notification("create", id=f"new{n}") for n in range(100)]
    await peer.send(b"".join(created))
    await peer.send(line("diff", id="slow", fd=0), w)
    peer.sock.close()
    os.close(w)
    with trio.fail_after(PATIENCE):
        while len(served.observed) < 101:
            await trio.testing.wait_all_tasks_blocked()
    assert len(served.driver.parents) == 101
    assert ("diff", "cancelled") in served.observed, "nobody is there to take it"
    assert os.read(r, 1) == b"", "and the descriptor is closed"
    os.close(r)


async def test_what_is_left_of_a_peer_of_the_monitor_socket_that_went_away_is_dropped(
    served: Served, connect: Connect
) -> None:
    """Or who comes and goes would leave behind more work than the share that the socket has."""
    peer, other = connect(served.monitor), connect(served.monitor)
    peer.sock.send(line("ping") * 300)
    peer.sock.close()
    await other.send(line("version"))
    assert "result" in await other.receive()
    with trio.fail_after(PATIENCE):
        while served.server.statistics().connections > 1:
            await trio.testing.wait_all_tasks_blocked()
    assert served.observed == [("version", "ok")]


async def test_a_peer_that_does_not_read_is_dropped_and_holds_up_nobody(
    nursery: trio.Nursery, tmp_path: Path, connect: Connect
) -> None:
    served = await start(nursery, tmp_path, ServerSettings(send_timeout=0.2))
    deaf, other = connect(served.control), connect(served.control)
    served.driver.parents["slow"] = None
    r, w = os.pipe()
    await deaf.send(line("diff", id="slow", fd=0), w)
    os.close(w)
    await served.driver.until_running(1)
    assert await refusal(deaf, line("rpc.discover")) in (errno.EAGAIN, errno.EPIPE)
    await other.settle()
    await dropped(served, "slow")
    await served.driver.until_running(0)
    await other.settle()
    assert await refusal(deaf, b"\n") == errno.EPIPE
    os.close(r)


@pytest.mark.parametrize("more", [b"", line("ping")], ids=["", "and asks on"])
async def test_a_peer_that_does_not_read_one_long_answer_leaves_nothing_behind(
    nursery: trio.Nursery, tmp_path: Path, connect: Connect, more: bytes
) -> None:
    served = await start(nursery, tmp_path, ServerSettings(send_timeout=0.2))
    deaf = connect(served.control)
    batch = [json.loads(line("rpc.discover", n)) for n in range(200)]
    await deaf.send(json.dumps(batch).encode() + b"\n")
    while not deaf.has_answer():
        await trio.testing.wait_all_tasks_blocked()
    await deaf.send(more)
    await dropped(served, "slow")
    with trio.fail_after(PATIENCE):
        while served.server.statistics().connections:
            await trio.testing.wait_all_tasks_blocked()
    assert served.server.statistics().in_flight == 0


async def test_no_frame_is_half_out_when_a_slow_reader_comes_back(
    served: Served, connect: Connect
) -> None:
    peer = connect(served.control)
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await peer.send(b"".join(line("rpc.discover", n) for n in range(40)))
    await trio.testing.wait_all_tasks_blocked()
    answers = [await peer.receive() for _ in range(40)]
    assert sorted(answer["id"] for answer in answers) == list(range(40))
    assert all(answer["result"]["openrpc"] for answer in answers)


async def test_while_its_answers_are_not_taken_no_more_of_a_peers_lines_are_begun(
    served: Served, connect: Connect
) -> None:
    """Else 64 of them wait in memory for each connection, and everybody may make thousands."""
    peer = connect(served.monitor)
    await peer.send(b"".join(line("rpc.discover", n) for n in range(64)))
    await trio.testing.wait_all_tasks_blocked()
    begun = len(served.observed)
    document = len(await peer.receive_line())
    room = peer.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) + (64 << 10)
    assert begun <= room // document + 2 < 64
    assert {(await peer.receive())["id"] for _ in range(63)} == set(range(1, 64))


async def test_a_batch_whose_answers_are_too_long_is_refused_from_there_on(
    served: Served, connect: Connect
) -> None:
    peer = connect(served.control)
    await peer.send(line("rpc.discover"))
    one = len(await peer.receive_line())
    fitting = (16 << 20) // one
    batch = [json.loads(line("rpc.discover", n)) for n in range(fitting + 20)]
    await peer.send(json.dumps(batch).encode() + b"\n")
    answers = await peer.receive()
    assert len(answers) == fitting + 20
    refused = [answer for answer in answers if "error" in answer]
    assert {name(answer) for answer in refused} == {"Overloaded"}
    assert 10 < len(refused) < 30


@pytest.mark.parametrize(
    "failure",
    [RuntimeError("the secret"), InternalError("of a child", traceback="the secret")],
    ids=["exception", "an archive child's"],
)
async def test_nothing_of_an_unexpected_exception_leaves_the_daemon(
    served: Served, connect: Connect, capfd: pytest.CaptureFixture[str], failure: Exception
) -> None:
    served.driver.failure = failure
    answer = await connect(served.control).ask("cleanup")
    assert (code(answer), name(answer)) == (-32603, "InternalError")
    assert "secret" not in json.dumps(answer)
    out, err = capfd.readouterr()
    logged = out + err
    assert answer["error"]["data"]["incident"] in logged
    assert "the secret" in logged
    assert ("cleanup", "InternalError") in served.observed


async def test_a_group_of_the_apis_own_errors_is_the_first_of_them(
    served: Served, connect: Connect
) -> None:
    served.driver.failure = ExceptionGroup("g", [ExceptionGroup("g", [UnmountBusy("busy")])])
    assert name(await connect(served.control).ask("cleanup")) == "UnmountBusy"


async def test_an_answer_that_is_no_json_is_an_internal_error(
    served: Served, connect: Connect
) -> None:
    served.driver.counts["\udc80"] = 1
    peer = connect(served.control)
    assert name(await peer.ask("mounts")) == "InternalError"
    await peer.settle()


async def test_the_driver_is_told_who_asks(served: Served, connect: Connect) -> None:
    served.driver.parents["a"] = None
    await connect(served.control).ask("get", id="a")
    [peer] = served.driver.peers
    assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.getuid(), os.getgid())
    assert peer.comm
    assert peer.start
