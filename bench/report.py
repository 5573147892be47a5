"""The run as a table for people, and as JSON and a chart for keeping."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench import chart
from bench.figures import Curve, Figure, Unit


@dataclass(slots=True)
class Run:
    """What one run found."""

    machine: dict[str, str]
    peers: dict[str, str]
    missing: list[str]
    figures: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    # what else the machine did, before and after
    load: list[float] = field(default_factory=lambda: [round(os.getloadavg()[0], 2)])


def heading(run: Run) -> str:
    """Where it was measured, and against what."""
    lines = [f"{key}: {value}" for key, value in run.machine.items()]
    lines += [f"{name} {version}" for name, version in run.peers.items()]
    lines += run.missing
    return "\n".join([*lines, ""])


def table(run: Run) -> str:
    """All figures; the last line says how many goals are missed."""
    rows = [line(figure) for figure in run.figures]
    judged = [figure.met for figure in run.figures if figure.goal is not None]
    parts = [f"{judged.count(False)} of {len(judged)} goals missed"]
    if unknown := judged.count(None):
        parts.append(f"{unknown} not measured")
    if run.failures:
        parts.append(f"{len(run.failures)} cases failed")
    return "\n".join([_HEAD, *rows, *run.failures, ", ".join(parts)])


_ROW = "{:<52} {:>10} {:>10}  {:<22} {:>7} {:>13} {:>9} {}"
_HEAD = _ROW.format("case", "aufsd", "yardstick", "", "ratio", "spread", "goal", "").rstrip()


def line(figure: Figure) -> str:
    """One row."""
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
    spread = ""
    if figure.spread is not None and figure.ratio is not None:
        spread = f"{figure.spread[0]:.2f} .. {figure.spread[1]:.2f}"
    verdict = {True: "", False: "MISSED", None: figure.note}[figure.met]
    return _ROW.format(
        figure.text,
        amount(figure.ours, figure.unit),
        "" if figure.theirs is None else amount(figure.theirs, figure.unit),
        figure.yardstick,
        ratio,
        spread,
        _goal(figure),
        verdict or figure.note,
    ).rstrip()


def _goal(figure: Figure) -> str:
    if figure.goal is None:
        return ""
    sign = ">=" if figure.goal.at_least else "<="
    if figure.goal.of == "ratio":
        return f"{sign} {figure.goal.limit:g}"
    return f"{sign} {amount(figure.goal.limit, figure.unit)}"


def amount(value: float, unit: Unit) -> str:
    """A figure with a unit that a person reads."""
    if unit == "calls/s":
        return f"{value:,.0f}/s"
    if unit == "bytes":
        return f"{value / (1 << 20):.1f} MB"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def write(run: Run, directory: Path) -> None:
    """bench.json and, if there is anything to draw, bench.svg."""
    run.load.append(round(os.getloadavg()[0], 2))
    rows = [{**msgspec.to_builtins(figure), "met": figure.met} for figure in run.figures]
    kept = {
        "began": run.began.isoformat(timespec="seconds"),
        "machine": run.machine,
        "load": run.load,
        "peers": run.peers,
        "missing": run.missing,
        "figures": rows,
        "curves": run.curves,
        "failures": run.failures,
    }
    text = msgspec.json.format(msgspec.json.encode(kept), indent=2)
    (directory / "bench.json").write_bytes(text + b"\n")
    if run.curves:
        (directory / "bench.svg").write_text(chart.draw(_panels(run.curves)))


def _panels(curves: Iterable[Curve]) -> dict[str, list[Curve]]:
    panels: dict[str, list[Curve]] = {}
    for curve in curves:
        panels.setdefault(curve.panel, []).append(curve)
    return panels
