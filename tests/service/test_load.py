"""Load: many clients, bad ones, dying ones, for long. Counts are right, nothing is left, and what
the daemon needs does not grow.

`AUFSD_SOAK=1000000` makes the longest of these as long as wished, in calls.
"""

import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path

import pytest
import trio

from aufsd.kernel import syscalls
from aufsd.threads import EVENTFDS_KEPT
from aufsd_client import Client, errors
from aufsd_client.trio import Client as TrioClient
from tests.archives import tar
from tests.daemon import Daemon, archive_processes, daemon, eventually
from tests.rpc.raw_peer import line

pytestmark = pytest.mark.service

LAYERS, CLIENTS, CALLS = 20, 200, 10_000
SOAK = int(os.environ.get("AUFSD_SOAK", "20000"))


@pytest.fixture(scope="module", autouse=True)
def _many_descriptors() -> Iterator[None]:
    """For a thousand connections at both ends; a daemon inherits it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A directory that no disk is waited for: an overlay's unmount syncs the file system below."""
    path = tmp_path / "ram"
    path.mkdir()
    syscalls.mount("tmpfs", str(path), "tmpfs", 0, "size=256m")
    yield path
    syscalls.umount2(str(path), syscalls.MNT_DETACH)


@pytest.fixture
def served(ram: Path) -> Iterator[Daemon]:
    with daemon(ram) as made:
        yield made


@pytest.fixture
def layers(client: Client) -> list[str]:
    """Layers to mount, on one base."""
    client.create("base")
    ids = [f"layer{number}" for number in range(LAYERS)]
    for id in ids:
        client.create(id, parent="base")
    return ids


def open_files(daemon: Daemon) -> Counter[str]:
    """What the daemon and its archive processes have open, by kind, once no job runs."""
    assert daemon.process is not None
    own = daemon.process.pid
    found: Counter[str] = Counter()

    def settled() -> bool:
        found.clear()
        try:
            for pid in (own, *archive_processes(own)):
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    found[re.sub(r"\d+", "N", os.readlink(f"/proc/{pid}/fd/{fd}"))] += 1
        except (FileNotFoundError, ProcessLookupError):
            return False
        # the mount thread keeps some for its next calls; the reader of the sockets has one
        kept = EVENTFDS_KEPT + 1
        found["anon_inode:[eventfd]"] = max(found["anon_inode:[eventfd]"], kept)
        # on which a child tries itself out before its job comes (archive/forkserver.py)
        return not found["/memfd:archive (deleted)"]

    eventually(settled)
    return found


def memory(daemon: Daemon) -> int:
    """Bytes that the daemon alone has in memory, files not counted."""
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def references(client: Client) -> dict[str, int]:
    return {row.id: row.references for row in client.mounts().mounts}


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(path)
    return sock


def assert_as_before(served: Daemon, client: Client, before: Counter[str]) -> None:
    """Nothing is counted, mounted, open or wrong that was not so before."""
    eventually(lambda: references(client) == {})
    assert served.mounts() == []
    # the daemon closes a connection a moment after its peer has
    eventually(lambda: open_files(served) <= before)
    assert client.check(deep=True).problems == []


async def test_200_clients_get_and_put_on_20_layers(
    served: Daemon, client: Client, layers: list[str]
) -> None:
    calls = 0
    before = open_files(served)

    async def work(seed: int) -> None:
        nonlocal calls
        rng = random.Random(seed)
        held: list[str] = []
        async with TrioClient(served.socket) as own:
            for _ in range(CALLS // CLIENTS // 2):
                id = rng.choice(layers)
                got = await own.get(id)
                held.append(id)
                assert got.mounted
                assert got.references >= 1
                # a counted layer is a mount point, whatever the others do
                assert os.path.ismount(got.path)
                calls += 1
                if rng.random() < 0.7:
                    await own.put(held.pop(rng.randrange(len(held))))
                    calls += 1
            for id in held:
                await own.put(id)
                calls += 1

    async with trio.open_nursery() as nursery:
        for seed in range(CLIENTS):
            nursery.start_soon(work, seed)
    assert calls == CALLS
    assert client.mounts().mounts == []
    assert_as_before(served, client, before)


KILLED = """
import json, os, random, signal, socket, sys

path, clients, calls, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def live(seed):
    rng = random.Random(seed)
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(path)
    replies = peer.makefile("rb")
    held = []
    for number in range(calls):
        if held and rng.random() < 0.5:
            method, params = "put", {"id": held.pop(rng.randrange(len(held)))}
        else:
            method, params = "get", {"id": rng.choice(layers), "hold": "process"}
            held.append(params["id"])
        line = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        data = json.dumps(line).encode() + b"\\n"
        fate = rng.random()
        if fate < 0.01:
            peer.sendall(data[: rng.randrange(len(data))])
            die()
        peer.sendall(data)
        if fate < 0.03:
            die()
        result = json.loads(replies.readline())["result"]
        assert method == "put" or result["references"] >= 1, result
    # what it still holds goes with it


def client(seed):
    status = 1
    try:
        live(seed)
        status = 0
    finally:
        os._exit(status)


children = [os.fork() or client(seed) for seed in range(clients)]
ends = [os.waitpid(child, 0)[1] for child in children]
print(json.dumps({str(end): ends.count(end) for end in set(ends)}))
"""


def test_processes_that_are_killed_at_any_point_hold_nothing(
    served: Daemon, client: Client, layers: list[str]
) -> None:
    before = open_files(served)
    program = [sys.executable, "-c", KILLED, served.socket, str(CLIENTS), str(CALLS // CLIENTS)]
    done = subprocess.run([*program, *layers], stdout=subprocess.PIPE, check=True)
    ends = json.loads(done.stdout)
    assert set(ends) == {"0", "9"}, "no client saw anything wrong"
    assert ends["9"] > CLIENTS // 2
    assert_as_before(served, client, before)


def test_connections_that_are_cut_at_any_point_count_what_was_sent_whole(
    served: Daemon, client: Client, layers: list[str]
) -> None:
    before = open_files(served)
    sent: Counter[str] = Counter()
    rng = random.Random(0)
    for _ in range(CLIENTS):
        with ExitStack() as stack:
            peer = stack.enter_context(connected(served.socket))
            replies = stack.enter_context(peer.makefile("rb"))
            held: list[str] = []
            for number in range(CALLS // CLIENTS // 5):
                if held and rng.random() < 0.5:
                    id, method, change = held.pop(), "put", -1
                else:
                    id, method, change = rng.choice(layers), "get", 1
                data = line(method, number, id=id)
                fate = rng.random()
                if fate < 0.02:
                    peer.sendall(data[: rng.randrange(len(data))])
                    break
                sent[id] += change
                peer.sendall(data)
                if fate < 0.08:
                    break
                assert json.loads(replies.readline())["result"]["mounted"] or method == "put"
                if method == "get":
                    held.append(id)
    left = +sent
    assert len(left) > LAYERS // 2
    eventually(lambda: references(client) == left)
    for id in left.elements():
        client.put(id)
    assert_as_before(served, client, before)


def test_a_thousand_connections_the_worst_of_peers_and_one_that_is_served(
    served: Daemon, client: Client, layers: list[str]
) -> None:
    client.apply_diff("base", tar({"file": b"x"}))
    before = open_files(served)
    rounds = []
    for _ in range(3):
        with ExitStack() as stack:
            crowd(stack, served)
            eventually(lambda: metric(client, "aufsd_connections") > 1000)
            for id in layers:
                assert client.get(id).references == 1
                assert client.put(id).references == 0
            client.diff("base", bytearray())
        assert_as_before(served, client, before)
        rounds.append(memory(served))
    # what the first ones needed is used again
    assert rounds[-1] - rounds[0] < 8 << 20, rounds


def crowd(stack: ExitStack, served: Daemon) -> None:
    """1,300 peers: idle, slow, half open, sending rubbish. The daemon has done with a fifth."""
    document, pings = line("rpc.discover") * 16, line("ping") * 20
    # they take no answers, for which they are dropped after a while; so they come last
    deaf_peers, rubbish_peers = [], []
    for number in range(130):
        peers = [
            stack.enter_context(connected(served.monitor_socket if odd else served.socket))
            for odd in (True, False) * 5
        ]
        idle, half, deaf, cut, rubbish, overlong, silent, other, polite, quiet = peers
        idle.sendall(b"{")
        half.sendall(line("ping")[:20])
        half.shutdown(socket.SHUT_WR)
        deaf_peers.append(deaf)
        cut.sendall(pings)
        cut.shutdown(socket.SHUT_RD)
        rubbish_peers.append(rubbish)
        if number < 20:
            with suppress(OSError):
                overlong.sendall(b"x" * (1100 << 10))
        silent.shutdown(socket.SHUT_WR)
        other.sendall(b"\0\xff\n[]\n[1]\nnull\n")
        polite.sendall(pings)
        with polite.makefile("rb") as replies:
            assert all(b'"result"' in replies.readline() for _ in range(20))
        quiet.sendall(pings)
    for deaf, rubbish in zip(deaf_peers, rubbish_peers, strict=True):
        deaf.sendall(document)
        with suppress(OSError):
            rubbish.sendall(b"{]\n" * 100)


def metric(client: Client, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.metrics().text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


class Caller:
    """Mixed calls on eight connections, sixteen at a time on each; a ninth now and then."""

    def __init__(self, served: Daemon, client: Client, layers: list[str]) -> None:
        self.served, self.client, self.layers = served, client, layers
        self.rng = random.Random(0)
        self.numbers = count()
        self.peers = [connected(served.socket) for _ in range(8)]
        self.replies = [peer.makefile("rb") for peer in self.peers]

    def close(self) -> None:
        for peer, replies in zip(self.peers, self.replies, strict=True):
            replies.close()
            peer.close()

    def make(self, calls: int) -> None:
        """So many calls and a few more."""
        made = 0
        for turn in count():
            if made >= calls:
                return
            for peer, replies in zip(self.peers, self.replies, strict=True):
                lines = [self.one() for _ in range(16)]
                peer.sendall(b"".join(lines))
                answers = [json.loads(replies.readline()) for _ in lines]
                assert len(answers) == 16
                made += 16
            for id in self.layers:
                # what was got is put again: one get for each was begun, and none more
                self.client.put(id)
            made += len(self.layers)
            if turn % 8 == 0:
                made += self.rare()

    def one(self) -> bytes:
        """Any call but a change; some of them are wrong."""
        id, number = self.rng.choice(self.layers), next(self.numbers)
        calls = (
            line("get", number, id=id),
            line("put", number, id=id),
            line("ping", number),
            line("exists", number, id=f"no-such-{number}"),
            line("get", number, id=f"no-such-{number}"),
            line("list", number, limit=5),
            line("mounts", number),
            line("status", number),
            line("health", number),
            line("get_metadata", number, id=id),
            line(f"no_such_method_{number}", number),
            line("ping", number, no_such_parameter=number),
            b'{"rubbish %d\n' % number,
            b"[%b,%b]\n" % (line("ping", number).strip(), line("ping", number).strip()),
        )
        return self.rng.choice(calls)

    def rare(self) -> int:
        """A layer made, filled, read and removed by a peer that comes and goes."""
        id = f"new{next(self.numbers)}"
        with Client(self.served.socket, timeout=60) as own:
            own.create(id, parent="base")
            own.apply_diff(id, tar({f"file{id}": b"x" * 5000}))
            own.diff(id, bytearray())
            own.changes(id)
            own.get(id, hold="process")
            own.remove(id, force=True)
            own.metrics()
        with connected(self.served.socket) as peer:
            peer.sendall(line("get", 1, id=self.layers[0])[:30])
        return 8


def test_memory_is_flat(served: Daemon, client: Client, layers: list[str]) -> None:
    caller = Caller(served, client, layers)
    caller.make(SOAK // 3)
    before, first = open_files(served), memory(served)
    caller.make(SOAK)
    last = memory(served)
    print(f"{SOAK} calls: {first >> 10} KiB before, {last >> 10} KiB after")
    for id in layers:
        while client.put(id).references:
            pass
    eventually(lambda: open_files(served) <= before)
    caller.close()
    assert last - first < 3 << 20, (first, last)


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["--max-connections", "--max-connections-per-uid"])
def test_connections_beyond_the_limit_are_told_and_closed(ram: Path, key: str) -> None:
    with daemon(ram, key, "3") as served, ExitStack() as stack:
        before = open_files(served)
        for _ in range(3):
            peer = stack.enter_context(connected(served.socket))
            peer.sendall(line("ping"))
            assert b'"result"' in peer.recv(4096)
        with connected(served.socket) as fourth, fourth.makefile("rb") as replies:
            answer, *rest = replies.readlines()
            assert (json.loads(answer)["error"]["code"], json.loads(answer)["id"]) == (-32001, None)
            assert rest == []
        # which the monitor socket's are not counted for
        with connected(served.monitor_socket) as other:
            other.sendall(line("ping"))
            assert b'"result"' in other.recv(4096)
        stack.close()
        eventually(lambda: open_files(served) <= before)
        with served.client() as client:
            client.ping()


@pytest.mark.parametrize(
    ("flags", "archives", "refuses"),
    [
        (("--max-calls-per-uid", "3"), 3, ("ping", "diff")),
        (("--max-jobs-per-uid", "3"), 3, ("diff",)),
        # one runs, 256 wait
        (("--max-jobs", "1"), 257, ("diff", "diff_size")),
    ],
    ids=["calls", "archives", "waiting"],
)
def test_calls_beyond_a_limit_are_refused_until_others_end(
    ram: Path, flags: tuple[str, ...], archives: int, refuses: tuple[str, ...]
) -> None:
    with daemon(ram, *flags) as served, ExitStack() as stack:
        with served.client() as client:
            client.create("base")
            client.apply_diff("base", tar({"file": bytes(2 << 20)}))
        before = open_files(served)
        # nobody reads what these write
        read, write = os.pipe()
        peers = [stack.enter_context(connected(served.socket)) for _ in range(archives // 60 + 1)]
        for number in range(archives):
            peer = peers[number % len(peers)]
            socket.send_fds(peer, [line("diff", number, id="base", fd=0)], [write])
        with connected(served.monitor_socket) as other, other.makefile("rb") as replies:

            def all_run() -> bool:
                other.sendall(line("metrics"))
                answer = json.loads(replies.readline())
                if "error" in answer:
                    # it is one of the same user's
                    return "--max-calls-per-uid" in flags
                wanted = [f"\naufsd_calls_in_flight {archives + 1}\n"]
                if "--max-jobs" in flags:
                    # a call looks at its layers before it stands in line
                    wanted.append(f"\naufsd_jobs_waiting {archives - 1}\n")
                return all(each in answer["result"]["text"] for each in wanted)

            eventually(all_run)
        for method in refuses:
            with connected(served.socket) as peer, peer.makefile("rb") as replies:
                if method == "diff":
                    socket.send_fds(peer, [line("diff", id="base", fd=0)], [write])
                else:
                    peer.sendall(line(method, **({} if method == "ping" else {"id": "base"})))
                assert json.loads(replies.readline())["error"]["code"] == -32001
        for peer in peers:
            peer.close()
        os.close(write)
        os.close(read)
        eventually(lambda: open_files(served) <= before)
        with served.client() as client:
            assert client.status().jobs == []
            assert client.diff("base", bytearray()).size > 2 << 20


def test_an_archive_that_nobody_reads_gives_its_place_to_the_next(ram: Path) -> None:
    flags = ("--max-jobs", "1", "--stream-timeout", "0.2")
    with daemon(ram, *flags) as served, served.client() as client:
        client.create("base")
        client.apply_diff("base", tar({"file": bytes(2 << 20)}))
        read, write = os.pipe()
        with os.fdopen(read, "rb"), os.fdopen(write, "wb") as out:
            with pytest.raises(errors.StreamBroken) as caught:
                client.diff("base", out)
            assert caught.value.data["errno"] == "ETIMEDOUT"
            assert client.diff("base", bytearray()).size > 2 << 20
