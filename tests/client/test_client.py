"""The blocking client against a real server."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aufsd.rpc.server import ServerSettings
from aufsd_client import BadReply, Client, ConnectionLost, DaemonUnreachable, results
from aufsd_client.errors import (
    AufsdError,
    InvalidParams,
    LayerExists,
    LayerInUse,
    LayerNotFound,
    Overloaded,
    ShuttingDown,
)
from tests.client.threaded import Daemon, running
from tests.rpc.fake_driver import TAR
from tests.strangers import let_in


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with Client(daemon.path) as made:
        made.create("a")
        yield made


ANSWERS: dict[str, tuple[Callable[[Client], object], object]] = {
    "version": (lambda c: c.version(), results.Version("0.0", 1, "fake", [])),
    "ping": (lambda c: c.ping(), results.Empty()),
    "status": (lambda c: c.status().status, [("Root Dir", "/nowhere")]),
    "health": (lambda c: c.health().checks, [results.HealthCheck("space", "ok", "plenty")]),
    "metrics": (lambda c: c.metrics(), results.Metrics("text/plain", "aufsd_up 1\n")),
    "exists": (lambda c: c.exists("a"), results.Exists(True)),
    "create": (lambda c: c.create("b", parent="a"), results.Created([])),
    "remove": (lambda c: c.remove("a"), results.Removed(True)),
    "remove nothing": (lambda c: c.remove("b"), results.Removed(False, "not-found", 0)),
    "get": (lambda c: c.get("a", hold="process"), results.Got("/mnt/a", 1, True, False)),
    "put": (lambda c: c.put("a"), results.Put(0, False, True)),
    "diff_size": (lambda c: c.diff_size("a"), results.Size(len(TAR))),
    "usage": (lambda c: c.usage("a"), results.Usage(4096, 2)),
    "seal": (lambda c: c.seal("a"), results.Usage(4096, 2)),
    "changes": (
        lambda c: c.changes("a", limit=1),
        results.Changes([results.Change("add", "/0")], "1"),
    ),
    "get_metadata": (
        lambda c: c.get_metadata("a"),
        results.Metadata({"id": "a", "content": "/diff/a"}),
    ),
    "cleanup": (
        lambda c: c.cleanup(),
        results.Cleanup([], [results.FailedUnmount("a", "EBUSY", [])]),
    ),
    "list": (
        lambda c: c.list(),
        results.Layers([results.LayerRow("a", "", 0, 0, False, 1.5)], ""),
    ),
    "mounts": (lambda c: c.mounts(), results.MountTable([])),
    "holders": (
        lambda c: c.holders("a"),
        results.Holders([results.Holder(1, "init", ["cwd"])]),
    ),
    "check": (
        lambda c: c.check("a", repair=True),
        results.Check([results.Problem("a", "stray", "x", True)]),
    ),
    "convert": (lambda c: c.convert("a", "overlay"), results.Converted(True)),
    "discover": (lambda c: c.discover()["openrpc"], "1.3.2"),
}


@pytest.mark.parametrize("method", ANSWERS)
def test_each_method_gives_its_result(client: Client, method: str) -> None:
    ask, wanted = ANSWERS[method]
    assert ask(client) == wanted


def test_an_error_is_raised_as_its_class_and_the_client_goes_on(client: Client) -> None:
    with pytest.raises(LayerExists, match="layer a exists") as caught:
        client.create("a")
    assert caught.value.data == {"id": "a"}
    with pytest.raises(LayerNotFound):
        client.get("b")
    assert client.ping() == results.Empty()


def test_any_method_can_be_called_by_name(client: Client) -> None:
    assert client.call("exists", {"id": "a"}) == {"exists": True}
    with pytest.raises(InvalidParams, match="there is no parameter `x`"):
        client.call("exists", {"id": "a", "x": 1})


def test_pages_are_followed(daemon: Daemon, client: Client) -> None:
    for n in range(2500):
        daemon.driver.parents[f"l{n}"] = None
    assert len(list(client.iter_layers())) == 2501
    found = list(client.iter_changes("a"))
    assert [change.path for change in found] == ["/0", "/1", "/2", "/3", "/4", "/\udcff"]
    assert os.fsencode(found[-1].path) == b"/\xff"


def test_mounted_is_get_and_put(daemon: Daemon, client: Client) -> None:
    with client.mounted("a") as path:
        assert path == "/mnt/a"
        assert daemon.driver.counts == {"a": 1}
    assert daemon.driver.counts == {"a": 0}
    with pytest.raises(ZeroDivisionError), client.mounted("a"):
        raise ZeroDivisionError
    assert daemon.driver.counts == {"a": 0}


def test_a_layer_in_use_is_not_removed_without_a_word(daemon: Daemon, client: Client) -> None:
    client.get("a")
    with pytest.raises(LayerInUse, match="it has 1 reference") as refused:
        client.remove("a")
    assert refused.value.data == {"id": "a", "references": 1}
    assert client.remove("a", in_use_ok=True).reason == "in-use"
    client.put("a")
    assert client.remove("a")
    assert not client.remove("a")


# --- streams ----------------------------------------------------------------------------------


def test_diff_goes_to_a_path_a_file_a_socket_or_a_bytearray(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "layer.tar"
    path.write_bytes(b"what was there before, and is longer")
    assert client.diff("a", path).size == len(TAR)
    assert path.read_bytes() == TAR
    with open(tmp_path / "other.tar", "wb") as file:
        file.write(b"first ")
        client.diff("a", file)
    assert (tmp_path / "other.tar").read_bytes() == b"first " + TAR
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client.diff("a", theirs)
        assert ours.recv(100) == TAR
    collected = bytearray(b"first ")
    assert client.diff("a", collected, digest=True).digest.startswith("sha256:")
    assert collected == b"first " + TAR


def test_apply_diff_comes_from_bytes_a_path_or_a_file(
    daemon: Daemon, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "layer.tar"
    path.write_bytes(b"content")
    with open(path, "rb") as file:
        for source in (b"content", path, str(path), file):
            daemon.driver.applied.clear()
            assert client.apply_diff("a", source).size == 7
            assert daemon.driver.applied == {"a": b"content"}


def test_a_diff_that_fails_leaves_no_new_file(client: Client, tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("x")
    for path in (new, old):
        with pytest.raises(LayerNotFound):
            client.diff("b", path)
    assert not new.exists()
    assert old.exists()


def test_a_long_diff_does_not_hold_up_another_thread(daemon: Daemon, client: Client) -> None:
    client.create("b")
    daemon.driver.parents["slow"] = None
    done = bytearray()
    thread = threading.Thread(target=client.diff, args=("slow", done))
    thread.start()
    daemon.until_running(1)
    assert client.get("b").references == 1
    assert not done
    daemon.do(daemon.driver.go.set)
    thread.join()
    assert done == TAR


# --- the connection ---------------------------------------------------------------------------


def test_many_threads_share_one_client(daemon: Daemon, client: Client) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                with client.mounted("a"):
                    pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert daemon.driver.counts == {"a": 0}
    assert daemon.driver.calls.count("get a done") == 600


def test_connections_are_used_again(daemon: Daemon, client: Client) -> None:
    for _ in range(20):
        client.ping()
    assert daemon.do(daemon.served.server.statistics).accepted == 1


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 3e6, 30, None])
def test_a_timeout_may_be_as_long_as_one_likes(daemon: Daemon, timeout: float | None) -> None:
    with Client(daemon.path, timeout=timeout) as client:
        client.ping()


def test_a_timeout_is_a_number(daemon: Daemon) -> None:
    with (
        Client(daemon.path, timeout=float("nan")) as client,
        pytest.raises(ValueError, match="number of seconds"),
    ):
        client.ping()


def test_a_call_that_takes_too_long_ends_in_a_timeout_and_is_carried_out(daemon: Daemon) -> None:
    with Client(daemon.path, timeout=0.05) as client:
        with pytest.raises(TimeoutError):
            client.create("slow")
        client.timeout = 30.0
        assert client.ping() == results.Empty(), "the late answer is not taken for this one's"
        daemon.do(daemon.driver.go.set)
        daemon.until_running(0)
    assert "slow" in daemon.driver.parents


def test_a_closed_client_says_so(daemon: Daemon) -> None:
    client = Client(daemon.path)
    client.ping()
    client.close()
    with pytest.raises(ValueError, match="closed"):
        client.ping()


def test_an_idle_connection_whose_daemon_has_ended_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "aufsd.sock"
    with Client(path) as client:
        for _ in range(2):
            with running(tmp_path):
                assert client.ping() == results.Empty()


def test_calls_of_a_daemon_that_stops_are_refused(daemon: Daemon) -> None:
    with Client(daemon.path) as client, Client(daemon.path) as other:
        client.ping()
        thread = threading.Thread(target=other.create, args=("slow",))
        thread.start()
        daemon.until_running(1)
        daemon.do(daemon.served.shutdown.set)
        daemon.settle()
        with pytest.raises(ShuttingDown):
            client.ping()
        daemon.do(daemon.driver.go.set)
        thread.join()
        daemon.until_done()
        with pytest.raises(DaemonUnreachable, match="no daemon listens"):
            client.ping()


def test_a_full_daemon_is_told_of(tmp_path: Path) -> None:
    with running(tmp_path, ServerSettings(max_connections=1)) as daemon, Client(daemon.path) as one:
        one.ping()
        for _ in range(20):
            with Client(daemon.path) as other, pytest.raises(Overloaded):
                other.ping()


@pytest.mark.parametrize("missing", ["file", "directory", "listener"])
def test_a_daemon_that_is_not_there_is_unreachable(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "sock"
    if missing == "directory":
        path = tmp_path / "none" / "sock"
    if missing == "listener":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    with Client(path) as client, pytest.raises(DaemonUnreachable, match="start it") as caught:
        client.ping()
    assert not isinstance(caught.value, AufsdError)


@pytest.mark.root
def test_a_socket_that_this_user_may_not_open_is_unreachable(daemon: Daemon) -> None:
    script = (
        "import os, sys\n"
        "from aufsd_client import Client, DaemonUnreachable\n"
        "os.setgroups([]); os.setresgid(*[12345] * 3); os.setresuid(*[12345] * 3)\n"
        "try: Client(sys.argv[1]).ping()\n"
        "except DaemonUnreachable as error: print(error)\n"
    )
    let_in(Path(daemon.path))
    found = subprocess.run(
        [sys.executable, "-c", script, daemon.path], capture_output=True, text=True, check=True
    )
    assert "join the group aufsd" in found.stdout


def test_a_long_path_is_reached(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    with running(directory) as daemon, Client(daemon.path) as client:
        assert client.ping() == results.Empty()


def test_after_a_fork_each_process_has_connections_of_its_own(daemon: Daemon) -> None:
    script = (
        "import os, sys\n"
        "from aufsd_client import Client\n"
        "client = Client(sys.argv[1])\n"
        "client.create('a'); client.get('a')\n"
        "child = os.fork()\n"
        "client.get('a')\n"
        "if child: assert os.waitpid(child, 0)[1] == 0; client.get('a')\n"
    )
    subprocess.run([sys.executable, "-c", script, daemon.path], check=True)
    pids = [peer.pid for peer in daemon.driver.peers]
    assert len(pids) == 4
    assert len(set(pids)) == 2


@contextmanager
def answering(path: Path, answer: bytes) -> Iterator[list[bytes]]:
    """A program that is no aufsd: reads what comes, says its piece, and closes. What it read."""
    read: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    read.append(peer.recv(1 << 16))
                    peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield read
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", ConnectionLost),
        (b'{"jsonrpc": "2.0", "resu', ConnectionLost),
        (b"HTTP/1.1 400\r\n", BadReply),
        (b'{"jsonrpc": "2.0", "result": {}, "id": "another"}\n', BadReply),
    ],
    ids=["nothing", "half an answer", "another protocol", "another's answer"],
)
def test_a_call_is_never_repeated(tmp_path: Path, answer: bytes, error: type[Exception]) -> None:
    path = tmp_path / "sock"
    with answering(path, answer) as read, Client(path) as client:
        with pytest.raises(error):
            client.get("a")
        assert len(read) == 1


@pytest.mark.parametrize("result", [{"path": 5}, {"path": "/"}, {}])
def test_a_result_that_does_not_fit_is_a_bad_reply(
    client: Client, monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]
) -> None:
    monkeypatch.setattr(client, "call", lambda *_, **__: result)
    with pytest.raises(BadReply):
        client.get("a")


def test_fields_that_a_newer_daemon_adds_are_left_out(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "call", lambda *_, **__: {"exists": True, "since": 5})
    assert client.exists("a") == results.Exists(True)


def test_importing_the_client_pulls_in_nothing_but_the_standard_library() -> None:
    script = (
        "import sys; before = set(sys.modules); import aufsd_client.asyncio, aufsd_client.client\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - sys.stdlib_module_names))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["aufsd_client"]
