"""aufsctl top: what its frames say, of made-up counts and of a real daemon."""

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from aufsd_client import Client
from aufsd_client.cli.top import Sample, frame, parse_metrics
from aufsd_client.results import Health, HealthCheck, Job, MountRow, MountTable, Status
from tests.archives import tar
from tests.daemon import Daemon

BEFORE = """\
aufsd_start_time_seconds 1000
aufsd_connections 7
aufsd_mount_thread_queue 2
aufsd_mount_thread_busy_seconds_total 3.0
aufsd_calls_total{method="get",outcome="ok"} 100
aufsd_call_seconds_bucket{method="get",le="0.001"} 100
aufsd_call_seconds_bucket{method="get",le="0.1"} 100
aufsd_call_seconds_bucket{method="get",le="+Inf"} 100
aufsd_call_seconds_sum{method="get"} 1.0
aufsd_archive_bytes_total{kind="diff"} 0
aufsd_store_free_bytes 1000000000
aufsd_store_size_bytes 4000000000
"""
AFTER = """\
aufsd_start_time_seconds 1000
aufsd_connections 7
aufsd_mount_thread_queue 2
aufsd_mount_thread_busy_seconds_total 4.0
aufsd_calls_total{method="get",outcome="ok"} 118
aufsd_calls_total{method="get",outcome="LayerNotFound"} 2
aufsd_call_seconds_bucket{method="get",le="0.001"} 110
aufsd_call_seconds_bucket{method="get",le="0.1"} 120
aufsd_call_seconds_bucket{method="get",le="+Inf"} 120
aufsd_call_seconds_sum{method="get"} 2.0
aufsd_archive_bytes_total{kind="diff"} 5000000
aufsd_store_free_bytes 1000000000
aufsd_store_size_bytes 4000000000
"""
STATUS = Status("aufsd", [], "overlay", "6.1", 12, 1, 3, [], [])
MOUNT = MountRow("web", "/s/mnt/web", "overlay", 3, True, False, "", 1000.0, [])


def sample(when: float, text: str) -> Sample:
    return Sample(when, parse_metrics(text), STATUS, Health("ok", []), MountTable([MOUNT]))


BEGIN, END = sample(4600.0, BEFORE), sample(4602.0, AFTER)


def test_a_frame_says_how_much_a_second() -> None:
    assert frame(BEGIN, END, 9) == [
        "aufsd on overlay, up 1 h 0 min; ok",
        "layers 12, mounts 1, references 3, connections 7",
        "calls 10.0/s, failed 1.0/s; mount thread 50% busy, 2 waiting; CPU 0%",
        "archives in 0 B/s, out 2.5 MB/s, 0 running, 0 waiting; store 1.0 GB free of 4.0 GB",
        "",
        "METHOD  CALLS/S  FAILED/S  MEAN     99 % WITHIN",
        "get     10.0     1.0       50.0 ms  100.0 ms",
        "",
        "MOUNT  BACKEND  MODE  REFERENCES  SINCE      HELD BY",
        "web    overlay  rw    3           1 h 0 min",
    ]


def test_a_daemon_that_was_started_again_counts_from_nothing() -> None:
    assert "calls 0.0/s, failed 0.0/s" in frame(END, BEGIN, 9)[2]


def test_what_is_not_well_is_said() -> None:
    health = Health("degraded", [HealthCheck("mounts", "degraded", "1 mount\x1b[31m is busy")])
    said = frame(BEGIN, replace(END, health=health), 9)
    assert said[0].endswith("; degraded")
    # nothing that a name holds may steer the terminal
    assert said[1] == r"  degraded: 1 mount\x1b[31m is busy"


def test_archives_that_run_are_listed() -> None:
    job = Job("base", "apply_diff", 4590.0, 12_000_000, 345)
    said = frame(BEGIN, replace(END, status=replace(STATUS, jobs=[job])), 9)
    assert "apply_diff  base  12 s   12.0 MB  345" in said


def test_more_mounts_than_there_is_room_for_are_counted() -> None:
    table = MountTable([replace(MOUNT, id=f"layer{n}", since=float(n)) for n in range(30)])
    said = frame(BEGIN, replace(END, mounts=table), 5)
    # the latest first
    assert said[-6].startswith("layer29")
    assert said[-1] == "and 25 more"


def test_who_may_not_see_the_mounts_sees_the_rest() -> None:
    said = frame(BEGIN, replace(END, mounts=None), 5)
    assert said[-1] == "the mounts are shown to root and the group aufsd"


# --- of a real daemon -----------------------------------------------------------------------------


def command(served: Daemon, *arguments: str) -> list[str]:
    where = ("--socket", served.socket)
    return [sys.executable, "-m", "aufsd_client.cli", *where, "top", "-n", "0.1", *arguments]


@pytest.mark.service
def test_frames_are_printed_one_after_the_other(served: Daemon, client: Client) -> None:
    client.create("base")
    client.apply_diff("base", tar({"motd": b"x"}))
    client.create("web", parent="base")
    client.get("web")
    done = subprocess.run(
        command(served, "--count", "3"), capture_output=True, text=True, check=True
    )
    frames = done.stdout.rstrip("\n").split("\n\n\n")[0].split("aufsd on overlay, up ")[1:]
    assert len(frames) == 3
    for each in frames:
        assert "layers 2, mounts 1, references 1" in each
        assert "\nweb    overlay  rw    1 " in each


@pytest.mark.service
def test_a_program_is_sent_elsewhere(served: Daemon) -> None:
    line = command(served)
    line.insert(3, "--json")
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "aufsctl --json metrics" in done.stderr


@contextmanager
def terminal(line: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command on a terminal of its own; the other end of that."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            line, stdin=theirs, stdout=theirs, env={**os.environ, "TERM": "xterm"}
        )
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
            process.wait()
    finally:
        os.close(ours)


def read_until(fd: int, wanted: bytes) -> bytes:
    """What comes from a terminal until something is in it."""
    seen = b""
    while wanted not in seen:
        assert select.select([fd], [], [], 30)[0], seen
        seen += os.read(fd, 1 << 16)
    return seen


@pytest.mark.service
def test_on_a_terminal_it_takes_the_screen_and_gives_it_back(served: Daemon) -> None:
    with terminal(command(served)) as (process, screen):
        # xterm's alternate screen
        seen = read_until(screen, b"mount thread")
        assert b"\x1b[?1049h" in seen
        process.send_signal(signal.SIGINT)
        read_until(screen, b"\x1b[?1049l")
        assert process.wait(30) == 0


@pytest.mark.service
def test_it_waits_for_a_daemon_that_is_started_again(served: Daemon) -> None:
    with terminal(command(served)) as (_, screen):
        read_until(screen, b"mount thread")
        served.stop()
        read_until(screen, b"no daemon")
        served.start()
        read_until(screen, b"mount thread")
