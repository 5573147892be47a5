"""A file whose server never answers, for the stream of an archive: no signal ends a wait for it."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from aufsd_client import Client
from aufsd_client.errors import AufsdError, StreamBroken
from aufsd_client.results import HealthCheck
from tests.archives import tar
from tests.daemon import Daemon, daemon, eventually
from tests.fuse_server import FLUSH, GETATTR, READ, WRITE, Served, serving

pytestmark = [pytest.mark.service, pytest.mark.fuse]


@contextmanager
def silent_file(directory: Path, *unanswered: int) -> Iterator[tuple[Served, int]]:
    """The file, open for both ways. Once its server is gone, whoever waits for it goes on."""
    directory.mkdir()
    with ExitStack() as last, serving(directory, *unanswered) as served:
        fd = os.open(served.silent, os.O_RDWR)
        last.callback(_close, fd)
        yield served, fd


def _close(fd: int) -> None:
    with suppress(OSError):
        os.close(fd)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that waits half a second for a stream, and has room for one archive."""
    with daemon(tmp_path, "--stream-timeout", "0.5", "--max-jobs", "1") as made:
        with made.client() as client:
            client.create("full")
            client.apply_diff("full", tar({"file": b"x" * 100_000}))
            client.create("empty")
        yield made


def archives(client: Client) -> HealthCheck:
    (found,) = (check for check in client.health().checks if check.name == "archives")
    return found


CALLS = {"diff": ("full", WRITE), "apply_diff": ("empty", READ)}


@pytest.mark.parametrize("method", CALLS)
def test_a_stream_that_nobody_answers_holds_its_own_call_until_its_time_is_over(
    tmp_path: Path, served: Daemon, client: Client, method: str
) -> None:
    id, unanswered = CALLS[method]
    with silent_file(tmp_path / "silent", unanswered) as (_, fd):
        with pytest.raises(StreamBroken) as caught:
            client.call(method, {"id": id, "fd": 0}, fd=fd)
        assert caught.value.data["errno"] == "ETIMEDOUT"
        told = archives(client)
        assert told.status == "degraded"
        assert f"{method} of {id}" in told.detail
        assert "silent" in told.detail
        assert "an archive process waits for its stream and cannot be ended" in served.log
        # the layer and the place are for the next
        client.apply_diff("empty", tar({"other": b""}))
        assert client.remove("empty").removed
    eventually(lambda: archives(client).status == "ok")


def test_the_peer_of_a_stream_that_nobody_answers_may_go_away(
    tmp_path: Path, client: Client, served: Daemon
) -> None:
    with silent_file(tmp_path / "silent", WRITE) as (silent, fd):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(served.socket)
            call = b'{"jsonrpc":"2.0","method":"diff","params":{"id":"full","fd":0},"id":1}\n'
            socket.send_fds(peer, [call], [fd])
            assert silent.asked.wait(30)
        eventually(lambda: not client.status().jobs)
        with (tmp_path / "tar").open("wb") as out:
            assert client.diff("full", out).size > 100_000


@pytest.mark.parametrize("unanswered", [GETATTR, FLUSH], ids=["stat", "close"])
@pytest.mark.parametrize("method", CALLS)
def test_no_server_of_a_file_is_asked_where_all_would_wait_for_it(
    tmp_path: Path, client: Client, served: Daemon, method: str, unanswered: int
) -> None:
    with silent_file(tmp_path / "silent", unanswered) as (_, fd):
        with suppress(AufsdError):
            # what is read from it is no archive, and nothing can be written to it
            client.call(method, {"id": CALLS[method][0], "fd": 0}, fd=fd)
        client.ping()
        assert ("does not answer its close" in served.log) == (unanswered == FLUSH)
        client.apply_diff("empty", tar({"other": b""}))


def test_whoever_waits_for_a_silent_file_holds_up_no_later_daemon(
    tmp_path: Path, served: Daemon
) -> None:
    with silent_file(tmp_path / "silent", WRITE) as (_, fd):
        with served.client() as client, pytest.raises(StreamBroken):
            client.call("diff", {"id": "full", "fd": 0}, fd=fd)
        assert served.stop() == 0
        served.start()
        with served.client() as client:
            assert archives(client).status == "ok"
