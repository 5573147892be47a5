"""Calls that mount nothing: `get` and `put` of a layer that is mounted, against a bare echo."""

import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from bench.daemon import Daemon, Line, daemon, request, require_result
from bench.figures import Goal, Outcome, alone, compare
from bench.harness import Bench, Case, interleaved, typical

# as Docker's layers are named
ID = f"{'0123456789abcdef' * 4}"
CONNECTIONS = 64


@contextmanager
def echo(path: Path) -> Iterator[str]:
    """A bare Trio echo on a socket."""
    process = subprocess.Popen([sys.executable, "-m", "bench.echo", path], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield str(path)
    finally:
        process.kill()
        process.communicate()


def mounted_layer(running: Daemon) -> tuple[bytes, bytes]:
    """Have a layer mounted for good; the lines that count one reference more, and less."""
    with running.client() as client:
        client.create("base")
        client.create(ID, parent="base")
        client.get(ID)
    return request("get", id=ID), request("put", id=ID)


def one_client(bench: Bench) -> Iterator[Outcome]:
    """How long a client waits that asks, waits, and asks again."""
    with (
        daemon(bench.work / "aufsd") as running,
        echo(bench.work / "echo") as path,
        closing(Line(running.socket)) as ours,
        closing(Line(path)) as theirs,
        running.client() as client,
    ):
        get, put = mounted_layer(running)
        require_result(ours.ask(get))
        require_result(ours.ask(put))

        def pair(line: Line) -> None:
            line.ask(get)
            line.ask(put)

        def library() -> None:
            client.get(ID)
            client.put(ID)

        measured = {
            "aufsd": partial(typical, partial(pair, ours), 400),
            "trio echo": partial(typical, partial(pair, theirs), 400),
            "library": partial(typical, library, 400),
        }
        found = interleaved(measured, bench.rounds(31), warm=2)
        text = "get + put of a mounted layer, one client, p50"
        yield compare("calls-one", text, found, "trio echo", goal=1.5)
        yield alone("calls-library", "the same with the client library", found["library"])


def many_clients(bench: Bench) -> Iterator[Outcome]:
    """How many calls a second are answered when 64 ask at a time."""
    number = 4000 if bench.quick else 10_000
    with (
        daemon(bench.work / "aufsd") as running,
        echo(bench.work / "echo") as path,
    ):
        lines = mounted_layer(running)
        measured = {
            "aufsd": partial(throughput, running.socket, lines, number),
            "trio echo": partial(throughput, path, lines, number),
        }
        found = interleaved(measured, bench.rounds(15))
        yield compare(
            "calls-64",
            f"the same, {CONNECTIONS} connections, calls per second",
            found,
            "trio echo",
            goal=Goal(0.5, at_least=True),
            unit="calls/s",
        )


def throughput(path: str, lines: tuple[bytes, bytes], number: int) -> float:
    """Calls per second over all connections, each of which asks again when it is answered.

    About `number` of them, so that every connection ends as it began. One poll loop, so that it
    costs less than what it measures.
    """
    rounds = number // CONNECTIONS // 2 * 2
    peers: dict[int, tuple[socket.socket, list[int]]] = {}
    with select.epoll() as poll:
        for _ in range(CONNECTIONS):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
            peers[sock.fileno()] = sock, [0]
            poll.register(sock, select.EPOLLIN)
        began = time.perf_counter()
        for sock, _ in peers.values():
            sock.sendall(lines[0])
        running = CONNECTIONS
        while running:
            for fd, _ in poll.poll():
                sock, asked = peers[fd]
                # replies are shorter than a packet, and come whole
                answer = sock.recv(65536)
                if b'"error"' in answer or not answer:
                    raise RuntimeError(f"a call failed: {answer!r}")
                asked[0] += 1
                if asked[0] < rounds:
                    sock.sendall(lines[asked[0] % 2])
                else:
                    running -= 1
        took = time.perf_counter() - began
    for sock, _ in peers.values():
        sock.close()
    return rounds * CONNECTIONS / took


CASES = (Case("calls-one", one_client), Case("calls-64", many_clients))
