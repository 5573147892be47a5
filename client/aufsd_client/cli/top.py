"""aufsctl top: mounts and rates, frame by frame. What the daemon counts, subtracted twice."""

import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from aufsd_client import Client
from aufsd_client.cli import show
from aufsd_client.cli.session import Session, seconds
from aufsd_client.errors import PermissionDenied
from aufsd_client.results import Health, MountTable, Status
from aufsd_client.wire import MONITOR_SOCKET, ConnectionLost, DaemonUnreachable

_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ROWS = 15  # of a table, where the output is no terminal


@dataclass(frozen=True, slots=True)
class Sample:
    """All that one frame is made from; times are this host's."""

    when: float
    # by name and labels
    metrics: dict[tuple[str, frozenset[tuple[str, str]]], float]
    status: Status
    health: Health
    # None where this user may ask the monitoring socket only
    mounts: MountTable | None

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        wanted = set(labels.items())
        return sum(
            value for (found, its), value in self.metrics.items() if found == name and wanted <= its
        )

    def values(self, name: str, label: str) -> list[str]:
        """What a label of a metric is, over all its samples."""
        found = {dict(its)[label] for (metric, its) in self.metrics if metric == name}
        return sorted(found)


def parse_metrics(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The samples of a Prometheus text exposition."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            sample, _, value = line.rpartition(" ")
            name, _, labels = sample.partition("{")
            found[name, frozenset(_LABEL.findall(labels))] = float(value)
    return found


def take(client: Client) -> Sample:
    """Ask the daemon."""
    try:
        mounts = None if client.path == MONITOR_SOCKET else client.mounts()
    except PermissionDenied:
        mounts = None
    text = client.metrics().text
    return Sample(time.time(), parse_metrics(text), client.status(), client.health(), mounts)


def frame(before: Sample, now: Sample, rows: int) -> list[str]:
    """The lines that show what happened between two samples; at most `rows` of each table."""
    lines = [*_summary(before, now), "", *_methods(before, now)]
    if now.status.jobs:
        lines += ["", *_jobs(now, rows)]
    lines += ["", *_mounts(now, rows)]
    return lines


def _rate(before: Sample, now: Sample, name: str, **labels: str) -> float:
    # a daemon that was started again counts from 0
    grown = max(now.total(name, **labels) - before.total(name, **labels), 0.0)
    return grown / max(now.when - before.when, 1e-9)


def _summary(before: Sample, now: Sample) -> Iterator[str]:
    up = now.when - now.total("aufsd_start_time_seconds")
    yield f"aufsd on {now.status.backend}, up {_span(up)}; {now.health.status}"
    for check in now.health.checks:
        if check.status != "ok":
            yield f"  {check.status}: {show.text(check.detail)}"
    calls = _rate(before, now, "aufsd_calls_total")
    well = _rate(before, now, "aufsd_calls_total", outcome="ok")
    busy = min(_rate(before, now, "aufsd_mount_thread_busy_seconds_total"), 1.0)
    yield (
        f"layers {now.status.layers}, mounts {now.status.mounts}, "
        f"references {now.status.references}, connections {now.total('aufsd_connections'):.0f}"
    )
    yield (
        f"calls {calls:.1f}/s, failed {calls - well:.1f}/s; mount thread {busy:.0%} busy, "
        f"{now.total('aufsd_mount_thread_queue'):.0f} waiting; "
        f"CPU {_rate(before, now, 'process_cpu_seconds_total'):.0%}"
    )
    read, written = (
        show.size(int(_rate(before, now, "aufsd_archive_bytes_total", kind=kind)))
        for kind in ("apply_diff", "diff")
    )
    free, size = (now.total(f"aufsd_store_{what}_bytes") for what in ("free", "size"))
    yield (
        f"archives in {read}/s, out {written}/s, {len(now.status.jobs)} running, "
        f"{now.total('aufsd_jobs_waiting'):.0f} waiting; "
        f"store {show.size(int(free))} free of {show.size(int(size))}"
    )


def _methods(before: Sample, now: Sample) -> list[str]:
    rows = []
    for method in now.values("aufsd_calls_total", "method"):
        calls = _rate(before, now, "aufsd_calls_total", method=method)
        if not calls:
            continue
        well = _rate(before, now, "aufsd_calls_total", method=method, outcome="ok")
        mean = _rate(before, now, "aufsd_call_seconds_sum", method=method) / calls
        within = _within(before, now, method, 0.99)
        rows.append((method, f"{calls:.1f}", f"{calls - well:.1f}", _duration(mean), within))
    rows.sort(key=lambda row: -float(row[1]))
    return _table(("METHOD", "CALLS/S", "FAILED/S", "MEAN", "99 % WITHIN"), rows)


def _within(before: Sample, now: Sample, method: str, share: float) -> str:
    """The bound of the histogram's bucket that this share of the calls falls below."""
    grown = {
        bound: _rate(before, now, "aufsd_call_seconds_bucket", method=method, le=bound)
        for bound in now.values("aufsd_call_seconds_bucket", "le")
    }
    for bound in sorted(grown, key=float):
        if grown[bound] >= share * grown["+Inf"]:
            return _duration(float(bound)) if bound != "+Inf" else "longer"
    return "-"


def _jobs(now: Sample, rows: int) -> list[str]:
    jobs = [
        (
            job.kind,
            show.text(job.id),
            _span(now.when - job.since),
            show.size(job.bytes),
            str(job.entries),
        )
        for job in now.status.jobs[:rows]
    ]
    return _table(("ARCHIVE", "ID", "SINCE", "BYTES", "ENTRIES"), jobs)


def _mounts(now: Sample, rows: int) -> list[str]:
    if now.mounts is None:
        return ["the mounts are shown to root and the group aufsd"]
    found = sorted(now.mounts.mounts, key=lambda row: -row.since)
    table = [
        (
            show.text(row.id),
            row.backend if row.mounted else "-",
            "ro" if row.read_only else "rw",
            str(row.references),
            _span(now.when - row.since),
            show.text(", ".join(f"{each.comm or '?'} ({each.pid})" for each in row.holders[:3])),
        )
        for row in found[:rows]
    ]
    lines = _table(("MOUNT", "BACKEND", "MODE", "REFERENCES", "SINCE", "HELD BY"), table)
    return [*lines, f"and {len(found) - rows} more"] if len(found) > rows else lines


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (names, *rows)
    ]


def _span(seconds: float) -> str:
    """How long, in the two largest units."""
    left = max(int(seconds), 0)
    for unit, length, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if left >= length:
            return f"{left // length} {unit} {left % length // part} {below}"
    return f"{left // 60} min {left % 60} s" if left >= 60 else f"{left} s"


def _duration(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


@click.command()
@click.option(
    *("-n", "--interval"),
    type=click.FloatRange(min=0.1, max=86400),
    callback=seconds,
    default=2.0,
    metavar="SECONDS",
    help="Between two frames; 2 if it is not said.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N frames.")
@click.pass_obj
def top(session: Session, interval: float, count: int | None) -> None:
    """Mounts and rates, as they change. Ctrl-C ends it.

    On a terminal it takes the screen; else the frames are printed one after the other.
    """
    if session.as_json:
        raise click.UsageError("top is for a person; `aufsctl --json metrics` is for a program")
    with _connected(session) as client, _screen() as draw:
        before = take(client)
        shown = 0
        try:
            while count is None or shown < count:
                time.sleep(interval)
                try:
                    now = take(client)
                except (ConnectionLost, DaemonUnreachable) as error:
                    # it may be on its way up again
                    draw([str(error)])
                else:
                    draw(frame(before, now, _room()))
                    before = now
                shown += 1
        except KeyboardInterrupt:
            pass


@contextmanager
def _connected(session: Session) -> Iterator[Client]:
    """A client of the control socket, or of the monitoring one where only that may be opened."""
    with session.client() as client:
        try:
            client.ping()
        except DaemonUnreachable as error:
            if session.socket or not isinstance(error.__cause__, PermissionError):
                raise
            client.path = MONITOR_SOCKET
        yield client


def _room() -> int:
    """Rows for a table."""
    if not sys.stdout.isatty():
        return _ROWS
    return max(shutil.get_terminal_size().lines - 18, 3)


class _Draw:
    """Shows a frame: in place of the one before it, or below it."""

    def __init__(self, live: Live | None) -> None:
        self._live = live

    def __call__(self, lines: Sequence[str]) -> None:
        text = "\n".join(lines)
        if self._live is None:
            click.echo(text + "\n")
        else:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)


@contextmanager
def _screen() -> Iterator[_Draw]:
    if not sys.stdout.isatty():
        yield _Draw(None)
        return
    with Live(console=Console(), screen=True, auto_refresh=False) as live:
        yield _Draw(live)


COMMANDS = (top,)
