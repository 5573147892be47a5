#!/usr/bin/python3
"""check_aufsd: a plugin for Nagios, Icinga and what else runs their plugins.

Asks the monitoring socket by itself and needs nothing but Python. Exit status 0 ok, 1 warning,
2 critical (also: the daemon does not run), 3 unknown; one line, and figures behind a bar.
"""

import argparse
import contextlib
import json
import os
import re
import socket
import sys
import time
from typing import Any, NamedTuple

OK, WARNING, CRITICAL, UNKNOWN = range(4)
NAMES = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
MONITOR_SOCKET = "/run/aufsd/monitor.sock"

# figure -> the metric that it is the sum of
FIGURES = {
    "layers": "aufsd_layers",
    "quarantined": "aufsd_layers_quarantined",
    "mounts": "aufsd_mounts",
    "busy": "aufsd_mounts_busy",
    "references": "aufsd_references",
    "queue": "aufsd_mount_thread_queue",
    "jobs": "aufsd_jobs_running",
    "waiting": "aufsd_jobs_waiting",
    "connections": "aufsd_connections",
}
HELP = f"""\
Figures for -w and -c: {", ".join(FIGURES)},
  free (percent of the store), free_inodes (percent), time (seconds that the answer took).
A RANGE is Nagios's: 10 (outside 0 to 10), 10: (below 10), ~:10 (above 10), @5:10 (5 to 10).
Example: check_aufsd -w free=20: -c free=10: -w time=1
"""


class NotServed(Exception):
    """The daemon does not answer; the text says how."""


class Range(NamedTuple):
    """When a figure is to be told."""

    text: str
    start: float
    end: float
    inside: bool

    def alerts(self, value: float) -> bool:
        """Whether the value is one to be told."""
        return (self.start <= value <= self.end) is self.inside


def parse_range(text: str) -> Range:
    """A range as the plugin guidelines have it; ValueError if it is none."""
    number = r"-?\d+(?:\.\d+)?"
    found = re.fullmatch(rf"(@?)(?:(~|{number})?:)?({number})?", text)
    if found is None or not text.strip("@"):
        raise ValueError(f"not a range: {text}")
    inside, start, end = found.groups()
    low = float("-inf") if start == "~" else float(start or 0)
    high = float("inf") if end is None else float(end)
    if low > high:
        raise ValueError(f"its start is behind its end: {text}")
    return Range(text, low, high, bool(inside))


def parse_threshold(text: str) -> tuple[str, Range]:
    """NAME=RANGE."""
    name, equals, limits = text.partition("=")
    if not equals or name not in (*FIGURES, "free", "free_inodes", "time"):
        raise argparse.ArgumentTypeError(f"not FIGURE=RANGE: {text}")
    try:
        return name, parse_range(limits)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def ask(path: str, timeout: float) -> dict[str, Any]:
    """The results of version, health and metrics, by method; NotServed, ValueError."""
    methods = ("version", "health", "metrics")
    calls = [{"jsonrpc": "2.0", "id": name, "method": name} for name in methods]
    until = time.monotonic() + timeout
    answer = b""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            sock.connect(path)
            # one that is turned away at the door finds it closed, and why in what it can read
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(json.dumps(calls).encode() + b"\n")
            while not answer.endswith(b"\n"):
                sock.settimeout(max(until - time.monotonic(), 0.001))
                data = sock.recv(1 << 16)
                if not data:
                    raise NotServed(f"aufsd closed the connection on {path}")
                answer += data
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotServed(f"aufsd does not run: nobody listens on {path}") from None
    except (TimeoutError, BlockingIOError):
        raise NotServed(f"aufsd did not answer on {path} within {timeout:g} s") from None
    except ConnectionError as error:
        raise NotServed(f"aufsd closed the connection on {path}: {error.strerror}") from None
    replies = json.loads(answer)
    if not isinstance(replies, list):
        # one error for all: refused at the door
        raise NotServed(f"aufsd refused to answer: {replies['error']['message']}")
    for reply in replies:
        if "error" in reply:
            raise NotServed(f"aufsd refused to answer: {reply['error']['message']}")
    return {reply["id"]: reply["result"] for reply in replies}


def figures(text: str, took: float) -> dict[str, float]:
    """What the metrics' text holds of what is told."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            sample, _, value = line.rpartition(" ")
            name = sample.partition("{")[0]
            sums[name] = sums.get(name, 0) + float(value)
    found = {figure: sums[metric] for figure, metric in FIGURES.items()}
    for figure, free, size in (
        ("free", "aufsd_store_free_bytes", "aufsd_store_size_bytes"),
        ("free_inodes", "aufsd_store_free_inodes", "aufsd_store_inodes"),
    ):
        # some file systems have no inodes to count
        if sums.get(size):
            found[figure] = round(100 * sums[free] / sums[size], 2)
    found["time"] = round(took, 4)
    return found


def told(
    found: dict[str, float], warning: dict[str, Range], critical: dict[str, Range]
) -> list[str]:
    """The figures as performance data."""
    units = {"free": "%", "free_inodes": "%", "time": "s"}
    data = []
    for name, value in found.items():
        limits = [given[name].text if name in given else "" for given in (warning, critical)]
        highest = "100" if units.get(name) == "%" else ""
        data.append(f"{name}={value:g}{units.get(name, '')};{limits[0]};{limits[1]};0;{highest}")
    return data


def judge(
    answer: dict[str, Any],
    found: dict[str, float],
    warning: dict[str, Range],
    critical: dict[str, Range],
) -> tuple[int, str]:
    """The exit status and the sentence."""
    level = {"ok": OK, "degraded": WARNING, "failing": CRITICAL}
    said = [
        (level[check["status"]], f"{check['name']}: {check['detail']}")
        for check in answer["health"]["checks"]
    ]
    for name, value in found.items():
        for status, given in ((CRITICAL, critical), (WARNING, warning)):
            if name in given and given[name].alerts(value):
                said.append((status, f"{name} is {value:g}, not within {given[name].text}"))
                break
    worst = max((status for status, _ in said), default=OK)
    if worst == OK:
        version = answer["version"]
        return OK, (
            f"aufsd {version['version']} on {version['backend']}: {found['layers']:g} layers, "
            f"{found['mounts']:g} mounts, {found['references']:g} references"
        )
    order = sorted((entry for entry in said if entry[0] != OK), key=lambda entry: -entry[0])
    return worst, "; ".join(sentence for _, sentence in order)


def check(arguments: list[str]) -> tuple[int, str, list[str]]:
    """The exit status, the sentence and the performance data."""
    parser = argparse.ArgumentParser(
        "check_aufsd",
        description="Is aufsd well?",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-s", "--socket", default=MONITOR_SOCKET, help="(default: %(default)s)")
    parser.add_argument(
        *("-t", "--timeout"), type=float, default=10.0, help="seconds (default: %(default)g)"
    )
    for flag, name in (("-w", "--warning"), ("-c", "--critical")):
        parser.add_argument(
            *(flag, name),
            metavar="FIGURE=RANGE",
            type=parse_threshold,
            action="append",
            default=[],
            help="repeatable",
        )
    given = parser.parse_args(arguments)
    warning, critical = dict(given.warning), dict(given.critical)
    began = time.monotonic()
    try:
        answer = ask(os.path.abspath(given.socket), given.timeout)
        found = figures(answer["metrics"]["text"], time.monotonic() - began)
        status, sentence = judge(answer, found, warning, critical)
    except NotServed as error:
        return CRITICAL, str(error), []
    except OSError as error:
        return UNKNOWN, f"{given.socket}: {error.strerror or error}", []
    except (ValueError, KeyError, TypeError) as error:
        return UNKNOWN, f"the answer is not one of aufsd's: {error!r}", []
    return status, sentence, told(found, warning, critical)


def main() -> int:
    """Print the line; the exit status."""
    try:
        status, sentence, data = check(sys.argv[1:])
    except SystemExit as left:
        # argparse says 2 for a wrong usage, which would be an alarm
        return UNKNOWN if left.code else OK
    # a bar begins the figures, wherever it stands
    sentence = " ".join(sentence.replace("|", "/").split())
    figures_ = f" | {' '.join(data)}" if data else ""
    print(f"AUFSD {NAMES[status]} - {sentence}{figures_}")
    return status


if __name__ == "__main__":
    sys.exit(main())
