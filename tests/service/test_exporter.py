"""metrics_listen: as much of HTTP as a scrape needs, on the loopback."""

import errno
import resource
import socket
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import pytest
import trio
import trio.testing

from aufsd import config, results
from aufsd.config import Config, ConfigError
from aufsd.service import exporter
from aufsd.service.metrics import CONTENT_TYPE
from aufsd.tasks import Task
from tests.daemon import Daemon, daemon

METRICS = results.Metrics(CONTENT_TYPE, "aufsd_layers 3\n")


async def ask(request: bytes) -> bytes:
    """All that comes back for a request."""
    sock = exporter.bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exporter.serve, sock, lambda: METRICS, Task("scrapes", ""))
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            for byte in request:
                await stream.send_all(bytes([byte]))
            answer = b"".join([data async for data in stream])
        nursery.cancel_scope.cancel()
    return answer


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /metrics HTTP/1.1", b"200 OK"),
        (b"GET /metrics?x=y HTTP/1.0", b"200 OK"),
        (b"HEAD /metrics HTTP/1.1", b"200 OK"),
        (b"POST /metrics HTTP/1.1", b"405 Method Not Allowed"),
        (b"GET / HTTP/1.1", b"404 Not Found"),
        (b"GET /metricsx HTTP/1.1", b"404 Not Found"),
        (b"GET /metrics HTTP/2", b"400 Bad Request"),
        (b"GET /metrics", b"400 Bad Request"),
        (b'{"jsonrpc": "2.0"}', b"400 Bad Request"),
    ],
)
async def test_only_metrics_are_here_and_only_to_be_read(
    request_line: bytes, status: bytes
) -> None:
    head, _, body = (await ask(request_line + b"\r\nHost: x\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"HTTP/1.1 " + status
    if status == b"200 OK":
        assert f"Content-Length: {len(METRICS.text)}".encode() in head
        assert body == (b"" if request_line.startswith(b"HEAD") else METRICS.text.encode())
    else:
        assert b"aufsd_layers" not in body


async def test_a_request_that_does_not_end_is_cut_off() -> None:
    # the exporter closes while more is still being sent
    answer = await ask(b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 1365)
    assert answer.startswith(b"HTTP/1.1 400 ")


async def test_who_says_nothing_keeps_nobody_waiting_for_long(
    autojump_clock: trio.testing.MockClock,
) -> None:
    sock = exporter.bind("127.0.0.1", 0)
    address = sock.getsockname()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exporter.serve, sock, lambda: METRICS, Task("scrapes", ""))
        silent = [await trio.open_tcp_stream(*address) for _ in range(20)]
        # the last of them is let in after those before it have been cut off
        for stream in silent:
            assert await stream.receive_some() == b""
            await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_a_scrape_that_fails_is_answered_told_and_ends_nothing() -> None:
    sock = exporter.bind("127.0.0.1", 0)
    address = sock.getsockname()
    task = Task("scrapes", "scrapes are answered")
    failures: list[Exception] = [ValueError("no figure"), OSError(errno.EMFILE, "too many")]
    seen = []

    def render() -> results.Metrics:
        if failures:
            raise failures.pop()
        return METRICS

    async with trio.open_nursery() as nursery:
        nursery.start_soon(exporter.serve, sock, render, task)
        for _ in range(3):
            async with await trio.open_tcp_stream(*address) as stream:
                await stream.send_all(b"GET /metrics HTTP/1.1\r\n\r\n")
                answer = b"".join([data async for data in stream])
            await trio.testing.wait_all_tasks_blocked()
            seen.append((answer.split(b"\r\n")[0], task.check().detail))
        nursery.cancel_scope.cancel()
    assert seen == [
        (b"HTTP/1.1 500 Internal Server Error", "too many (EMFILE)"),
        (b"HTTP/1.1 500 Internal Server Error", "ValueError: no figure"),
        (b"HTTP/1.1 200 OK", "scrapes are answered"),
    ]


async def test_without_a_descriptor_left_scrapes_wait_until_there_is_one() -> None:
    sock = exporter.bind("127.0.0.1", 0)
    address = sock.getsockname()
    task = Task("scrapes", "")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with trio.open_nursery() as nursery:
        async with await trio.open_tcp_stream(*address) as stream:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                nursery.start_soon(exporter.serve, sock, lambda: METRICS, task)
                while not task.failing:
                    await trio.sleep(0.01)
                assert task.check().detail == "Too many open files (EMFILE)"
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            await stream.send_all(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 OK")
        nursery.cancel_scope.cancel()
    assert not task.failing


@pytest.mark.parametrize("text", ["127.0.0.1:9433", "127.1.2.3:1", "[::1]:9433", "::1:9433"])
def test_an_address_of_the_loopback_will_do(text: str) -> None:
    found = config.metrics_address(Config(metrics_listen=text))
    assert found is not None
    assert found[0] in text


@pytest.mark.parametrize(
    "text",
    [
        *("", "on", "9433", ":9433", "0.0.0.0:9433", "192.168.0.1:9433", "[::]:9433"),
        *("localhost:9433", "127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:-1"),
    ],
)
def test_any_other_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a loopback address with a port"):
        config.metrics_address(Config(metrics_listen=text))


# --- of a real daemon -----------------------------------------------------------------------------


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert isinstance(port, int)
        return port


@pytest.mark.service
def test_a_scrape_reads_what_the_method_answers(tmp_path: Path) -> None:
    port = free_port()
    with (
        daemon(tmp_path, "--metrics-listen", f"127.0.0.1:{port}") as served,
        served.client() as client,
    ):
        client.create("base")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
            scraped = response.read().decode()
            assert response.headers["Content-Type"] == client.metrics().content_type
        assert "\naufsd_layers 1\n" in scraped
        with pytest.raises(HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30)


@pytest.mark.service
def test_it_is_off_unless_it_is_asked_for(served: Daemon) -> None:
    assert served.process is not None
    tables = [Path(f"/proc/{served.process.pid}/net/{name}") for name in ("tcp", "tcp6")]
    listening = {row.split()[9] for table in tables for row in table.read_text().splitlines()[1:]}
    links = {str(fd.readlink()) for fd in Path(f"/proc/{served.process.pid}/fd").iterdir()}
    assert not {f"socket:[{inode}]" for inode in listening} & links


@pytest.mark.service
def test_a_port_that_is_taken_is_one_sentence_that_names_it(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        where = f"127.0.0.1:{sock.getsockname()[1]}"
        status, said = Daemon(tmp_path, tmp_path / "store").refused("--metrics-listen", where)
    assert status == 1
    assert said.splitlines()[-1] == f"aufsd: metrics_listen = {where}: Address already in use"
