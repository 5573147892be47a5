"""Descriptors over a connection: claimed in order, owned at once, closed however the call ends."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.rpc.fake_driver import TAR
from tests.rpc.raw_peer import PATIENCE, RawPeer, code, line, name, notification
from tests.rpc.serving import Connect, Served


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe; the writing end is expected to be closed in the block."""
    r, w = os.pipe()
    os.set_blocking(r, False)
    try:
        yield r, w
    finally:
        os.close(r)


async def read_to_end(r: int) -> bytes:
    """What comes through a pipe until nobody has its writing end any more."""
    found = b""
    with trio.fail_after(PATIENCE):
        while True:
            await trio.lowlevel.wait_readable(r)
            data = os.read(r, 1 << 16)
            if not data:
                return found
            found += data


async def send_and_close(peer: RawPeer, data: bytes, *fds: int) -> None:
    await peer.send(data, *fds)
    for fd in fds:
        os.close(fd)


@pytest.fixture
def peer(served: Served, connect: Connect) -> RawPeer:
    served.driver.parents |= {"a": None, "b": None, "slow": None}
    return connect(served.control)


async def test_diff_writes_to_the_descriptor_and_closes_it(peer: RawPeer) -> None:
    with pipe() as (r, w):
        await send_and_close(peer, line("diff", id="a", fd=0, digest=True), w)
        result = (await peer.receive())["result"]
        assert (result["size"], result["digest"][:7]) == (len(TAR), "sha256:")
        assert await read_to_end(r) == TAR


async def test_apply_diff_reads_from_it(served: Served, peer: RawPeer) -> None:
    r, w = os.pipe()
    os.write(w, b"content")
    os.close(w)
    await send_and_close(peer, line("apply_diff", id="a", fd=0), r)
    assert "digest" not in (await peer.receive())["result"]
    assert served.driver.applied == {"a": b"content"}


@pytest.mark.parametrize("first", [1, 30, -2], ids=["in the first", "amid", "but the newline"])
@pytest.mark.parametrize("along", ["first", "second"])
async def test_it_may_come_with_a_part_of_the_line(peer: RawPeer, first: int, along: str) -> None:
    call = line("diff", id="a", fd=0)
    with pipe() as (r, w):
        await peer.send(call[:first], *([w] if along == "first" else []))
        await trio.testing.wait_all_tasks_blocked()
        await peer.send(call[first:], *([w] if along == "second" else []))
        os.close(w)
        assert "result" in await peer.receive()
        assert await read_to_end(r) == TAR


async def test_segments_that_the_kernel_merges_keep_each_its_own(
    served: Served, connect: Connect
) -> None:
    """A read may begin with earlier lines, and ends after the segment that carries descriptors."""
    served.driver.parents |= {"a": None, "b": None}
    busy = connect(served.control)
    with pipe() as (r1, w1), pipe() as (r2, w2):
        # nothing is awaited in between, so all of it waits in the socket when it is first read
        for data, fds in (
            (line("ping", 1), ()),
            (line("diff", 2, id="a", fd=0), (w1,)),
            (line("ping", 3)[:5], ()),
            (line("ping", 3)[5:] + line("diff", 4, id="b", fd=0)[:20], (w2,)),
            (line("diff", 4, id="b", fd=0)[20:], ()),
        ):
            busy.sock.sendmsg(
                [data],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, "little")) for fd in fds],
            )
        os.close(w1)
        os.close(w2)
        answers = {answer["id"]: answer for answer in [await busy.receive() for _ in range(4)]}
        assert all("result" in answer for answer in answers.values())
        assert await read_to_end(r1) == TAR
        assert await read_to_end(r2) == TAR


async def test_lines_of_one_sendmsg_claim_in_their_order(peer: RawPeer, tmp_path: Path) -> None:
    files = [open(tmp_path / str(n), "w+b") for n in range(3)]  # noqa: SIM115
    # the second cannot be written to: that it fails shows which one it got
    readable = os.open(tmp_path / "1", os.O_RDONLY)
    lines = b"".join(line("diff", n, id="a", fd=0) for n in range(3))
    await peer.send(lines, files[0].fileno(), readable, files[2].fileno())
    answers = {answer["id"]: answer for answer in [await peer.receive() for _ in range(3)]}
    assert {n for n, answer in answers.items() if "error" in answer} == {1}
    assert [os.path.getsize(tmp_path / str(n)) for n in range(3)] == [len(TAR), 0, len(TAR)]
    for file in files:
        file.close()
    os.close(readable)


async def test_a_batch_claims_in_the_order_of_its_calls(peer: RawPeer) -> None:
    calls = [
        line("diff", 1, id="a", fd=0),
        line("ping", 2),
        line("diff", 3, id="missing", fd=0),
        notification("diff", id="a", fd=0),
    ]
    with pipe() as (r1, w1), pipe() as (r2, w2), pipe() as (r3, w3):
        batch = json.dumps([json.loads(call) for call in calls]).encode() + b"\n"
        await send_and_close(peer, batch, w1, w2, w3)
        answers = await peer.receive()
        assert [("result" in answer) for answer in answers] == [True, True, False]
        assert await read_to_end(r1) == TAR
        assert await read_to_end(r2) == b""
        assert await read_to_end(r3) == TAR


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (line("diff", id="missing", fd=0), "LayerNotFound"),
        (line("diff", id="../a", fd=0), "InvalidLayerId"),
        (line("diff", id="a", fd=0, other=1), "InvalidParams"),
        (line("exists", id="a", fd=0), "InvalidParams"),
        (line("apply_diff", id="a", fd=0), "InvalidDescriptor"),
        (line("nothing", fd=0), "MethodNotFound"),
        (line("diff", id="a", fd=1), "InvalidParams"),
        (line("diff", id="a", fd=False), "InvalidParams"),
        (line("diff", id="a"), "InvalidParams"),
        (b'{"jsonrpc": "1.0", "method": "diff", "params": {"fd": 0}}\n', "InvalidRequest"),
        (b"garbage\n", "ParseError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_descriptor_is_closed_however_the_call_ends(
    peer: RawPeer, call: bytes, error: str
) -> None:
    with pipe() as (r, w):
        await send_and_close(peer, call, w)
        assert name(await peer.receive()) == error
        assert await read_to_end(r) == b""


async def test_one_that_no_line_claims_is_closed_and_the_next_call_has_its_own(
    peer: RawPeer,
) -> None:
    with pipe() as (stray, w1), pipe() as (r, w2):
        await send_and_close(peer, line("ping"), w1)
        assert await read_to_end(stray) == b""
        await send_and_close(peer, line("diff", id="a", fd=0), w2)
        await peer.receive()
        assert "result" in await peer.receive()
        assert await read_to_end(r) == TAR


async def test_a_call_without_one_is_told_so(peer: RawPeer) -> None:
    answer = await peer.ask("diff", id="a", fd=0)
    assert (code(answer), name(answer)) == (-32602, "InvalidDescriptor")


async def test_a_call_does_not_wait_for_one_that_comes_later(peer: RawPeer) -> None:
    with pipe() as (r, w):
        assert name(await peer.ask("diff", id="a", fd=0)) == "InvalidDescriptor"
        await send_and_close(peer, line("ping"), w)
        assert await read_to_end(r) == b""


@pytest.mark.parametrize("count", [5, 8, 9, 20])
async def test_more_than_four_unclaimed_drop_the_connection(
    served: Served, peer: RawPeer, count: int
) -> None:
    with pipe() as (r, w):
        await peer.send(line("ping"), *[w] * count)
        os.close(w)
        assert await peer.receive_line() == b""
        assert await read_to_end(r) == b""
        assert served.server.statistics().dropped == {"descriptors": 1}


async def test_four_may_wait_for_their_lines(peer: RawPeer) -> None:
    with pipe() as (r, w):
        await peer.send(line("diff", 0, id="a", fd=0) + b"[", *[w] * 4)
        os.close(w)
        assert "result" in await peer.receive()
        await trio.testing.wait_all_tasks_blocked()
        rest = b",".join(line("diff", n, id="a", fd=0).strip() for n in (1, 2, 3))
        await peer.send(rest + b"]\n")
        assert all("result" in answer for answer in await peer.receive())
        assert await read_to_end(r) == TAR * 4


async def test_a_received_descriptor_is_not_inherited_by_children(
    served: Served, peer: RawPeer
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pipe() as (r, w):
        await peer.send(line("diff", id="slow", fd=0), w)
        await served.driver.until_running(1)
        new = {int(fd) for fd in set(os.listdir("/proc/self/fd")) - before} - {r, w}
        same = [fd for fd in new if _is_same(fd, w)]
        assert len(same) == 1
        assert not os.get_inheritable(same[0])
        os.close(w)
        served.driver.go.set()
        assert await read_to_end(r) == TAR


def _is_same(fd: int, other: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.fstat(other))
    except OSError:
        return False


@pytest.mark.parametrize("unfinished", [b"", b"{"], ids=["between lines", "within a line"])
async def test_nothing_stays_open_when_the_peer_is_gone(
    served: Served, peer: RawPeer, unfinished: bytes
) -> None:
    with pipe() as (r, w):
        await peer.send(line("diff", id="slow", fd=0) + unfinished, w, w)
        os.close(w)
        await served.driver.until_running(1)
        peer.sock.close()
        assert await read_to_end(r) == b""


async def test_the_monitor_socket_takes_none(served: Served, connect: Connect) -> None:
    peer = connect(served.monitor)
    with pipe() as (r, w):
        await send_and_close(peer, line("diff", id="a", fd=0), w)
        assert name(await peer.receive()) == "PermissionDenied"
        assert await read_to_end(r) == b""
        await peer.settle()


async def test_a_long_sendmsg_keeps_its_descriptor_for_its_last_line(
    served: Served, peer: RawPeer
) -> None:
    padding = line("exists", 1, id="x" * 20_000) * 9
    with pipe() as (r, w):
        await send_and_close(peer, padding + line("diff", 2, id="a", fd=0), w)
        answers = [await peer.receive() for _ in range(10)]
        assert {answer["id"] for answer in answers if "result" in answer} == {2}
        assert await read_to_end(r) == TAR
