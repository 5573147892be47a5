"""From another mount namespace a `get` gives what is seen there, or an error; no wrong path."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from aufsd.kernel import syscalls
from aufsd.kernel.sight import hidden_from_host
from aufsd_client import Client
from tests.archives import tar
from tests.daemon import Daemon, daemon

pytestmark = [pytest.mark.service, pytest.mark.mounts]

SCRIPT = """
import os, sys
from aufsd_client import Client, errors
client = Client(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    verb, id = line.split()
    try:
        if verb == "get":
            print(",".join(sorted(os.listdir(client.get(id).path))), flush=True)
        else:
            client.put(id)
            print("put", flush=True)
    except errors.AufsdError as error:
        print(f"{error.code} {error.data.get('path')}", flush=True)
"""


@dataclass
class Caller:
    """A client in a mount namespace of its own, over one connection."""

    process: subprocess.Popen[str]

    def ask(self, *words: str) -> str:
        """What `get ID` shows, or its error."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{' '.join(words)}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@contextmanager
def elsewhere(served: Daemon, propagation: str) -> Iterator[Caller]:
    words = ["unshare", "--mount", "--propagation", propagation, sys.executable, "-c", SCRIPT]
    with subprocess.Popen(
        [*words, served.socket], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield Caller(process)
        finally:
            process.kill()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon whose store lies on a shared mount, as `/` is under systemd."""
    ground = tmp_path / "ground"
    ground.mkdir()
    syscalls.mount(str(ground), str(ground), "", syscalls.MS_BIND)
    syscalls.mount("", str(ground), "", syscalls.MS_SHARED)
    try:
        with daemon(tmp_path, root=ground / "store") as made:
            yield made
    finally:
        syscalls.umount2(str(ground), syscalls.MNT_DETACH)


@pytest.fixture
def layers(client: Client) -> None:
    """`top` on `base`, and `alone`; each with a file of its name."""
    for id, parent in (("base", ""), ("top", "base"), ("alone", "")):
        client.create(id, parent=parent)
        client.apply_diff(id, tar({id: b"x"}))


def counts(client: Client) -> dict[str, int]:
    return {row.id: row.references for row in client.mounts().mounts}


@pytest.mark.usefixtures("layers")
def test_a_mount_that_the_caller_would_not_see_is_refused_and_not_counted(
    served: Daemon, client: Client
) -> None:
    path = served.root / "mnt" / "top"
    with elsewhere(served, "private") as caller:
        assert caller.ask("get", "top") == f"401 {path}"
        assert counts(client) == {}
        assert served.mounts() == []
        # nor is it when others have it
        client.get("top")
        assert caller.ask("get", "top") == f"401 {path}"
        assert counts(client) == {"top": 1}
        # shown read-only, as others stand on it
        assert caller.ask("get", "base") == f"401 {served.root / 'mnt' / 'base'}"
        # the content itself is the same directory everywhere
        assert caller.ask("get", "alone") == "alone"
    # of one that was mounted when the namespace was made, the copy is the layer until it is not
    with elsewhere(served, "private") as caller:
        assert caller.ask("get", "top") == "base,top"
        assert caller.ask("get", "top") == "base,top"
        assert caller.ask("put", "top") == "put"
        client.put("top")
        client.put("top")
        client.get("base")
        assert caller.ask("get", "base") == f"401 {served.root / 'mnt' / 'base'}"


@pytest.mark.usefixtures("layers")
def test_a_namespace_that_gets_the_daemons_mounts_is_served(served: Daemon, client: Client) -> None:
    with elsewhere(served, "slave") as caller:
        for expected in (1, 2):
            assert caller.ask("get", "top") == "base,top"
            assert counts(client) == {"top": expected}
        for _ in range(2):
            assert caller.ask("put", "top") == "put"
        assert counts(client) == {}


@pytest.mark.usefixtures("layers")
def test_a_stale_copy_of_a_union_is_not_the_layer(served: Daemon, client: Client) -> None:
    client.create("above", parent="top")  # read-only from here on
    client.get("top")
    with elsewhere(served, "private") as caller:
        client.put("top")
        client.get("top")
        assert caller.ask("get", "top") == f"401 {served.root / 'mnt' / 'top'}"
        assert counts(client) == {"top": 1}


def test_a_daemon_whose_mounts_the_host_does_not_see_says_so_at_the_start(tmp_path: Path) -> None:
    """As with PrivateMounts= in its unit. The tests have a mount namespace of their own."""
    with daemon(tmp_path) as served:
        hidden = hidden_from_host(str(tmp_path))
        assert ("its mounts do not appear there" in served.log) == hidden
