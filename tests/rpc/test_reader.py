"""Calls that arrived together: what they changed is written down once, before any is answered."""

import trio
import trio.testing

from aufsd.store.ids import LayerId
from tests.rpc.raw_peer import RawPeer, line
from tests.rpc.serving import Connect, Served

A, SLOW = LayerId("a"), LayerId("slow")


async def crowd(served: Served, connect: Connect, size: int) -> list[RawPeer]:
    """Connections that are served already: what they send with no await between arrives at once."""
    served.driver.parents |= {A: None, SLOW: None}
    peers = [connect(served.control) for _ in range(size)]
    for peer in peers:
        await peer.settle()
    return peers


def watch(served: Served, peers: list[RawPeer]) -> list[tuple[list[str], list[bool]]]:
    """What is written down from here on, and who had been answered by then."""
    seen: list[tuple[list[str], list[bool]]] = []

    def written(changes: list[str]) -> None:
        seen.append((changes, [peer.has_answer() for peer in peers]))

    served.driver.tick.written = written
    return seen


async def test_nobody_is_answered_before_all_is_written_down(
    served: Served, connect: Connect
) -> None:
    peers = await crowd(served, connect, 3)
    seen = watch(served, peers)
    for peer in peers:
        peer.sock.send(line("get", id=A))
    counts = [(await peer.receive())["result"]["references"] for peer in peers]
    assert counts == [1, 2, 3]
    assert seen == [([f"get {A}"] * 3, [False] * 3)]


async def test_so_is_one_that_is_alone(served: Served, connect: Connect) -> None:
    peers = await crowd(served, connect, 1)
    seen = watch(served, peers)
    assert (await peers[0].ask("get", id=A))["result"]["references"] == 1
    assert seen == [([f"get {A}"], [False])]


async def test_of_one_connection_the_answers_keep_their_order(
    served: Served, connect: Connect
) -> None:
    (peer,) = await crowd(served, connect, 1)
    seen = watch(served, [])
    for number, method in enumerate(("ping", "get", "ping", "get", "ping", "get", "ping")):
        peer.sock.send(line(method, number, **({"id": A} if method == "get" else {})))
    assert [(await peer.receive())["id"] for _ in range(7)] == list(range(7))
    assert [changes for changes, _ in seen] == [[f"get {A}"] * 3]


async def test_those_before_one_that_waits_are_answered_meanwhile(
    served: Served, connect: Connect
) -> None:
    first, slow, last = peers = await crowd(served, connect, 3)
    for peer, id in zip(peers, (A, SLOW, A), strict=True):
        peer.sock.send(line("get", id=id))
    assert (await first.receive())["result"]["references"] == 1
    assert (await last.receive())["result"]["references"] == 2
    assert not slow.has_answer()
    served.driver.go.set()
    assert (await slow.receive())["result"]["references"] == 1


async def test_peers_that_do_not_read_hold_up_no_other_answer(
    served: Served, connect: Connect
) -> None:
    *deaf, good = peers = await crowd(served, connect, 4)
    unread = [0] * len(deaf)
    for number, peer in enumerate(deaf):
        # until an answer does not go out whole
        while served.server.statistics().in_flight == number:
            await peer.send(line("rpc.discover"))
            unread[number] += 1
            await trio.testing.wait_all_tasks_blocked()
    for peer in peers:
        peer.sock.send(line("get", id=A))
    assert (await good.receive())["result"]["references"] == 4
    for peer, documents in zip(deaf, unread, strict=True):
        for _ in range(documents):
            assert "openrpc" in (await peer.receive())["result"]
        assert (await peer.receive())["result"]["path"] == f"/mnt/{A}"
    await good.settle()
    assert served.server.statistics().in_flight == 0
