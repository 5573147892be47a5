"""One other user, with 64 connections and nothing good in mind: others are served as before.

What is compared was measured in one run, with and without that user.
"""

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aufsd_client import Client
from tests.daemon import Daemon, eventually
from tests.strangers import let_in

pytestmark = pytest.mark.service

NOBODY = 65534
CONNECTIONS = 64
MEMORY = 200 << 10  # KiB
# whoever is starved is so in each of them; what else the machine does is not always there
ROUNDS = 5

# which attack, and whether it reads the answers or never does
HOSTILE = """
import os, socket, sys, threading, time

path, attack, reads, uid, connections = sys.argv[1:]
os.setgroups([])
os.setgid(int(uid))
os.setuid(int(uid))


def call(method, id=""):
    params = ',"params":{"id":"%s"}' % id if id else ""
    return ('{"jsonrpc":"2.0","method":"%s"%s,"id":1}' % (method, params)).encode()


data = {
    "batches": b"[" + b",".join([call("ping")] * 600) + b"]\\n",
    "batches of long answers": b"[" + b",".join([call("rpc.discover")] * 500) + b"]\\n",
    "metrics": (call("metrics") + b"\\n") * 100,
    "unfinished lines": b"x" * 30_000,
    "overlong lines": b"x" * (1 << 20),
    "refused calls": (call("get", "x" * 9_000) + b"\\n") * 9,
    "short lines": b"\\n" * 60_000,
}[attack]


def send():
    while True:
        try:
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(path)
            if reads == "reads":
                threading.Thread(target=take, args=(peer,), daemon=True).start()
            while True:
                peer.sendall(data)
        except OSError:
            time.sleep(0.01)


def take(peer):
    try:
        while peer.recv(1 << 20):
            pass
    except OSError:
        pass


for _ in range(int(connections)):
    threading.Thread(target=send, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""
ATTACKS = (
    "batches",
    "batches of long answers",
    "metrics",
    "unfinished lines",
    "overlong lines",
    "refused calls",
    "short lines",
)


@contextmanager
def hostile(served: Daemon, attack: str, reads: str) -> Iterator[None]:
    """The other user at work."""
    what = (served.monitor_socket, attack, reads, str(NOBODY), str(CONNECTIONS))
    process = subprocess.Popen(
        [sys.executable, "-c", HOSTILE, *what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.kill()
        process.communicate()


def typical(client: Client) -> float:
    """How long a counted get and put take together: the middle one of many, in seconds."""
    found = []
    for _ in range(1000):
        began = time.perf_counter()
        client.get("top")
        client.put("top")
        found.append(time.perf_counter() - began)
    return sorted(found)[len(found) // 2]


def high_water(served: Daemon) -> int:
    """The most memory that the daemon ever had, in KiB (proc_pid_status(5), VmHWM)."""
    assert served.process is not None
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{served.process.pid}/status").read_text())
    assert found is not None
    return int(found[1])


@pytest.fixture
def mounted(served: Daemon, client: Client) -> Daemon:
    let_in(Path(served.monitor_socket))
    client.create("base")
    client.create("top", parent="base")
    client.get("top")
    return served


@pytest.mark.parametrize("reads", ["reads", "deaf"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_user_on_the_monitor_socket_holds_up_no_other(
    mounted: Daemon, client: Client, attack: str, reads: str
) -> None:
    log = mounted.directory / "log"
    written = os.path.getsize(log)
    ratios: list[float] = []
    while len(ratios) < ROUNDS and min(ratios, default=math.inf) > 2:
        before = typical(client)
        with hostile(mounted, attack, reads):
            ratios.append(typical(client) / before)
            assert client.get("top").references == 2
            client.put("top")
    text = f"{ratios} of undisturbed, {high_water(mounted) >> 10} MiB"
    print(f"{attack}, {reads}: {text}")
    assert high_water(mounted) <= MEMORY, text
    assert min(ratios) <= 2, text
    # four thousand calls of our own in each round write a line each, of 250 bytes
    assert os.path.getsize(log) - written < len(ratios) * (2 << 20)
    eventually(lambda: client.status().references == 1)
