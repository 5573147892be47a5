"""Bad input has its code, the daemon goes on, and the store is as it was."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aufsd_client import Client, errors
from tests.archives import tar
from tests.daemon import Daemon, daemon, eventually

pytestmark = pytest.mark.service


def tree_hash(root: Path) -> str:
    """Names, types, modes, owners, contents of a store, but for what waits to be deleted."""
    digest = hashlib.sha256()
    for directory, names, files in os.walk(root):
        if directory.endswith("/.aufsd/removing"):
            names.clear()
        names.sort()
        for name in sorted([*names, *files]):
            path = Path(directory, name)
            found = path.lstat()
            digest.update(f"{path} {found.st_mode} {found.st_uid} {found.st_gid}\n".encode())
            if path.is_file():
                digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all of these tests: each of them leaves the store as it was."""
    with daemon(tmp_path_factory.mktemp("served")) as made:
        yield made


@pytest.fixture(scope="module")
def client(served: Daemon) -> Iterator[Client]:
    with served.client() as made:
        yield made


@pytest.fixture(scope="module")
def filled(served: Daemon, client: Client) -> Daemon:
    client.create("base")
    client.apply_diff("base", tar({"d": None, "d/f": b"x", "l": "d/f"}))
    client.create("top", parent="base")
    return served


CALLS: list[tuple[str, Callable[[Client], object], type[errors.AufsdError]]] = [
    ("slash", lambda c: c.create("a/b"), errors.InvalidLayerId),
    ("dots", lambda c: c.create(".."), errors.InvalidLayerId),
    ("newline", lambda c: c.create("a\n"), errors.InvalidLayerId),
    ("long", lambda c: c.create("a" * 300), errors.InvalidLayerId),
    ("empty", lambda c: c.create(""), errors.InvalidLayerId),
    ("removing", lambda c: c.create("x-removing"), errors.InvalidLayerId),
    ("no parent", lambda c: c.create("new", parent="nosuch"), errors.ParentNotFound),
    ("twice", lambda c: c.create("top", parent="base"), errors.LayerExists),
    ("option", lambda c: c.create("new", storage_opt={"size": "1G"}), errors.InvalidParams),
    ("unknown get", lambda c: c.get("nosuch"), errors.LayerNotFound),
    ("unknown usage", lambda c: c.usage("nosuch"), errors.LayerNotFound),
    ("unknown seal", lambda c: c.seal("nosuch"), errors.LayerNotFound),
    ("unknown diff", lambda c: c.diff_size("nosuch"), errors.LayerNotFound),
    ("unknown apply", lambda c: c.apply_diff("nosuch", tar({})), errors.LayerNotFound),
    ("parent in use", lambda c: c.remove("base"), errors.LayerHasChildren),
    ("garbage", lambda c: c.apply_diff("top", b"\xff" * 4096), errors.BadArchive),
    ("nothing", lambda c: c.apply_diff("top", b""), errors.BadArchive),
    ("cut", lambda c: c.apply_diff("top", tar({"f": b"x" * 5000})[:4096]), errors.BadArchive),
    ("escape", lambda c: c.apply_diff("top", tar({"../../f": b"x"})), errors.ArchiveEscape),
    ("forged", lambda c: c.apply_diff("top", tar({"d/.wh..wh.x": b""})), errors.ArchiveEscape),
]


@pytest.mark.parametrize(
    ("call", "error"), [case[1:] for case in CALLS], ids=[case[0] for case in CALLS]
)
def test_a_call_that_is_refused_changes_nothing(
    filled: Daemon,
    client: Client,
    call: Callable[[Client], object],
    error: type[errors.AufsdError],
) -> None:
    before = tree_hash(filled.root)
    with pytest.raises(error):
        call(client)
    assert tree_hash(filled.root) == before
    assert os.listdir(filled.root / ".aufsd/staging") == []
    client.ping()


def exchange(daemon: Daemon, data: bytes) -> bytes:
    """Send raw bytes, and read until the daemon has closed or has answered one line."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(30)
        peer.connect(daemon.socket)
        peer.sendall(data)
        answer = b""
        while not answer.endswith(b"\n") and (part := peer.recv(65536)):
            answer += part
        return answer


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"garbage\n", -32700),
        (b'{"jsonrpc": "2.0", "method": "ping", "id": 1, \xff}\n', -32700),
        (b"[]\n", -32600),
        (b'{"jsonrpc": "2.0", "method": 1, "id": 1}\n', -32600),
        (b"x" * (2 << 20), -32600),
        (b'{"jsonrpc": "2.0", "method": "nosuch", "id": 1}\n', -32601),
        (b'{"jsonrpc": "2.0", "method": "get", "params": ["top"], "id": 1}\n', -32602),
        (b'{"jsonrpc": "2.0", "method": "get", "params": {"id": 7}, "id": 1}\n', -32602),
        (
            b'{"jsonrpc": "2.0", "method": "diff", "params": {"id": "top", "fd": 0}, "id": 1}\n',
            -32602,
        ),
    ],
    ids=["garbage", "bytes", "empty", "shape", "2 MiB", "method", "position", "type", "no fd"],
)
def test_garbage_on_the_socket_has_its_code(filled: Daemon, line: bytes, code: int) -> None:
    before = tree_hash(filled.root)
    assert json.loads(exchange(filled, line))["error"]["code"] == code
    with filled.client() as client:
        client.ping()
    assert tree_hash(filled.root) == before


def test_a_client_that_dies_in_the_middle_of_a_diff(filled: Daemon, client: Client) -> None:
    client.apply_diff("top", tar({"big": b"x" * (8 << 20)}))
    before = filled.descriptors()
    script = (
        "import os, sys; from aufsd_client import Client\n"
        "r, w = os.pipe()\n"
        f"client = Client({filled.socket!r})\n"
        "import threading\n"
        "threading.Thread(target=lambda: (os.read(r, 1), os._exit(9))).start()\n"
        "client.diff('top', os.fdopen(w, 'wb'))\n"
    )
    died = subprocess.run([sys.executable, "-c", script], check=False)
    assert died.returncode == 9
    eventually(lambda: not client.status().jobs)
    client.apply_diff("top", tar({"after": b""}))
    eventually(lambda: filled.descriptors() <= before)


def test_a_client_that_dies_in_the_middle_of_an_apply(filled: Daemon, client: Client) -> None:
    before = tree_hash(filled.root / "diff")
    script = (
        "import os, threading; from aufsd_client import Client\n"
        "r, w = os.pipe()\n"
        f"client = Client({filled.socket!r})\n"
        "def feed():\n"
        f"    os.write(w, {tar({'f': b'x' * 4096})[:3000]!r})\n"
        "    while not client.status().jobs: pass\n"
        "    os._exit(9)\n"
        "threading.Thread(target=feed).start()\n"
        "client.apply_diff('top', os.fdopen(r, 'rb'))\n"
    )
    died = subprocess.run([sys.executable, "-c", script], check=False)
    assert died.returncode == 9
    eventually(lambda: not client.status().jobs)
    eventually(lambda: not os.listdir(filled.root / ".aufsd/staging"))
    assert tree_hash(filled.root / "diff") == before
    assert client.check().problems == []


def test_the_second_daemon_on_a_root_is_refused(filled: Daemon) -> None:
    before = tree_hash(filled.root)
    other = Daemon(filled.directory / "other", filled.root)
    other.directory.mkdir()
    status, said = other.refused()
    assert status == 3
    assert "another process serves" in said
    assert tree_hash(filled.root) == before


def test_what_the_command_line_gets_wrong_is_one_sentence(tmp_path: Path) -> None:
    cases = {
        ("--max-jobs", "many"): "--max-jobs many",
        ("--backend", "zfs"): "backend",
        ("--state-dir", "/no/such/place"): "/no/such/place",
        ("--config", "/no/such/file"): "/no/such/file",
    }
    for flags, expected in cases.items():
        status, said = Daemon(tmp_path, tmp_path / "store").refused(*flags)
        assert status == 2, said
        assert expected in said
        assert len(said.strip().splitlines()) == 1, said
    assert os.listdir(tmp_path) == []


def test_a_store_on_which_nothing_can_stand_is_refused_in_words(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    for sub in ("layers", "diff/a", "mnt/a"):
        (docker / sub).mkdir(parents=True)
    (docker / "layers/a").write_text("")
    status, said = Daemon(tmp_path, docker).refused()
    assert status == 3
    assert "--adopt" in said
