"""What a run gives: figures against their goals, and curves for the chart."""

from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Literal

import msgspec

Unit = Literal["s", "calls/s", "bytes"]

# of one side, one value a round
Samples = Mapping[str, Sequence[float]]


class Goal(msgspec.Struct, frozen=True):
    """What is to be reached: of the ratio to the yardstick, or of our own figure."""

    limit: float
    of: Literal["ratio", "figure"] = "ratio"
    at_least: bool = False


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table: a case against one yardstick.

    `ours` and `theirs` are medians over the rounds. `ratio` is the median of the ratios of single
    rounds, and `spread` their quartiles: what else the machine does for a while falls on both sides
    of a round, and on one of two medians. Without a yardstick, of our own figures.
    """

    case: str
    text: str
    unit: Unit
    ours: float
    yardstick: str = ""
    theirs: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    goal: Goal | None = None
    rounds: int = 1
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None if there is none, or nothing to judge it by."""
        if self.goal is None:
            return None
        value = self.ratio if self.goal.of == "ratio" else self.ours
        if value is None:
            return None
        return value >= self.goal.limit if self.goal.at_least else value <= self.goal.limit


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """How a cost grows: for one line of the chart. Points are (how much there is, seconds)."""

    panel: str
    name: str
    points: tuple[tuple[float, float], ...]


Outcome = Figure | Curve


def compare(
    case: str,
    text: str,
    samples: Samples,
    yardstick: str,
    *,
    ours: str = "aufsd",
    goal: float | Goal | None = None,
    unit: Unit = "s",
    missing: str = "",
) -> Figure:
    """The figure of `ours` against one of the other sides; `missing` says why that has none."""
    own = samples[ours]
    goal = Goal(goal) if isinstance(goal, float) else goal
    if yardstick not in samples:
        return Figure(
            case=case,
            text=text,
            unit=unit,
            ours=median(own),
            yardstick=yardstick,
            goal=goal,
            rounds=len(own),
            note=missing or "the yardstick was not measured",
        )
    other = samples[yardstick]
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    return Figure(
        case=case,
        text=text,
        unit=unit,
        ours=median(own),
        yardstick=yardstick,
        theirs=median(other),
        ratio=median(ratios),
        spread=quartiles(ratios),
        goal=goal,
        rounds=len(own),
    )


def alone(
    case: str,
    text: str,
    values: Sequence[float],
    *,
    goal: float | None = None,
    unit: Unit = "s",
    note: str = "",
) -> Figure:
    """A figure that is judged by itself."""
    return Figure(
        case=case,
        text=text,
        unit=unit,
        ours=median(values),
        spread=quartiles(values),
        goal=None if goal is None else Goal(goal, of="figure"),
        rounds=len(values),
        note=note,
    )


def quartiles(values: Sequence[float]) -> tuple[float, float] | None:
    """The middle half of what was measured; None of a single value."""
    if len(values) < 2:
        return None
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high
