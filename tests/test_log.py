"""The log: what a line is, and that nobody waits for it to be read."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from aufsd.service import log


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    # loggers keep what they were made with, so the defaults of structlog would not reach them
    log.configure()


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_event_is_one_line_of_json(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as file:
        log.configure(fd=file.fileno())
        structlog.get_logger("x").info("call", method="get", layer="a\nb", odd=Path("/"))
        structlog.get_logger("x").info("a path", path="\udc80")
    first, second = lines(path)
    assert first.pop("timestamp")
    assert first == {
        "event": "call",
        "level": "info",
        "method": "get",
        "layer": "a\nb",
        "odd": "PosixPath('/')",
    }
    assert second["path"] == "\udc80"


def test_the_level_may_change_while_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logger = structlog.get_logger("x")
    with path.open("w") as file:
        log.configure("warning", fd=file.fileno())
        logger.info("one")
        log.configure("debug", fd=file.fileno())
        logger.debug("two")
    assert [line["event"] for line in lines(path)] == ["two"]


def test_a_traceback_shows_no_values(tmp_path: Path) -> None:
    path = tmp_path / "log"

    def fail(password: str) -> None:
        raise RuntimeError(f"boom of length {len(password)}")

    with path.open("w") as file:
        log.configure(fd=file.fileno())
        try:
            fail(password="".join(["se", "cret"]))
        except RuntimeError as error:
            structlog.get_logger("x").error("incident", exc_info=error)
    [line] = lines(path)
    assert "boom of length 6" in str(line["exception"])
    assert "secret" not in path.read_text()


def test_a_terminal_gets_text() -> None:
    ours, theirs = os.openpty()
    log.configure(fd=theirs)
    structlog.get_logger("x").info("call", method="get")
    text = os.read(ours, 4096).decode()
    assert "call" in text
    assert not text.startswith("{")
    os.close(ours)
    os.close(theirs)


def test_the_journal_gets_the_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    with path.open("w") as file:
        found = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        log.configure(fd=file.fileno())
        structlog.get_logger("x").warning("peer dropped")
    assert path.read_text().startswith('<4>{"timestamp":"')


def test_a_log_that_nobody_reads_holds_up_nobody_and_what_was_lost_is_told() -> None:
    r, w = os.pipe()
    writer = log.Writer(w)
    line = b'{"event": "x"}' + b" " * 1000
    while not writer.dropped:
        writer.write(line)
    for _ in range(9):
        writer.write(line)
    found = b""
    os.set_blocking(r, False)
    while b"dropped" not in found:
        found += os.read(r, 1 << 16)
        writer.flush()
    *whole, last = [json.loads(text) for text in found.splitlines()]
    assert last == {"event": "log lines were dropped", "count": 10}
    assert len(whole) > 1000
    os.close(r)
    writer.write(line)
    assert writer.dropped == 0, "nobody is there any more, and nothing is kept for him"
    os.close(w)


def test_lines_are_not_mixed_up_when_they_go_out_in_pieces() -> None:
    r, w = os.pipe()
    writer = log.Writer(w)
    wanted = [json.dumps({"n": n, "text": "x" * 3000}) for n in range(100)]
    for line in wanted:
        writer.write(line.encode())
    found = b""
    while found.count(b"\n") < 100:
        found += os.read(r, 1 << 16)
        writer.flush()
    assert found.decode().splitlines() == wanted
    os.close(r)
    os.close(w)


def test_what_is_held_is_not_lost_when_the_log_is_set_up_anew() -> None:
    """As a reload does, while nobody reads the pipe."""
    ours, theirs = os.pipe2(os.O_NONBLOCK)
    writer = log.configure(json=True, fd=theirs)
    logger = structlog.get_logger("x")
    written = 0
    while not writer.unwritten:
        logger.info("line", number=written)
        written += 1
    log.configure("debug", json=True, fd=theirs).flush()
    logger.debug("the last")
    read = b""
    while b"the last" not in read:
        read += os.read(ours, 1 << 16)
        log.configure(json=True, fd=theirs).flush()
    found = [json.loads(line) for line in read.splitlines()]
    assert [line["number"] for line in found[:-1]] == list(range(written))
    os.close(ours)
    os.close(theirs)


def test_lines_beyond_a_rate_are_counted_and_not_written() -> None:
    limit = log.RateLimit(3, 2.0)
    assert [limit.allows(1, 0.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert limit.allows(2, 0.0), "another one's"
    assert [limit.allows(1, 1.0) for _ in range(3)] == [True, True, False]
    assert limit.take_left_out() == {1: 3}
    assert limit.take_left_out() == {}
    assert [limit.allows(1, 1000.0) for _ in range(4)] == [True] * 3 + [False]
