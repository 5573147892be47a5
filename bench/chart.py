"""A small SVG writer: panels side by side, logarithmic both ways, a line for each curve."""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil, floor, log10
from xml.sax.saxutils import escape

from bench.figures import Curve

_WIDTH, _HEIGHT = 460, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 34, 44
_ACROSS = 2
_COLOURS = ("#0b5394", "#cc4125", "#6aa84f", "#8e63b5", "#b8860b", "#45818e")
_STYLE = (
    "text{font:12px sans-serif;fill:#333}.title{font-weight:bold;font-size:14px}"
    ".grid{stroke:#e3e3e3}.axis{stroke:#888}polyline{fill:none;stroke-width:2}"
)


def draw(panels: Mapping[str, Sequence[Curve]]) -> str:
    """The chart; a panel is named by what grows along its horizontal axis."""
    rows = ceil(len(panels) / _ACROSS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH * _ACROSS}" '
        f'height="{_HEIGHT * rows}">',
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (name, curves) in enumerate(panels.items()):
        x, y = number % _ACROSS * _WIDTH, number // _ACROSS * _HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_panel(name, curves), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _panel(name: str, curves: Sequence[Curve]) -> Iterator[str]:
    xs = _Scale([x for curve in curves for x, _ in curve.points], _LEFT, _WIDTH - _RIGHT)
    ys = _Scale([y for curve in curves for _, y in curve.points], _HEIGHT - _BOTTOM, _TOP)
    yield f'<text class="title" x="{_LEFT}" y="20">cost by {escape(name)}</text>'
    for decade in xs.decades():
        at = xs.place(decade)
        yield f'<path class="grid" d="M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
        yield (
            f'<text text-anchor="middle" x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 18}">'
            f"{decade:,.0f}</text>"
        )
    for decade in ys.decades():
        at = ys.place(decade)
        yield f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text text-anchor="end" x="{_LEFT - 6}" y="{at + 4:.1f}">{_time(decade)}</text>'
    yield f'<path class="axis" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield f'<text text-anchor="middle" x="{middle}" y="{_HEIGHT - 8}">{escape(name)}</text>'
    for index, curve in enumerate(curves):
        colour = _COLOURS[index % len(_COLOURS)]
        places = [(xs.place(x), ys.place(y)) for x, y in curve.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline stroke="{colour}" points="{line}"/>'
        yield from (f'<circle fill="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places)
        at = _TOP + 14 + 16 * index
        yield f'<path stroke="{colour}" stroke-width="3" d="M{_LEFT + 12} {at - 4}h18"/>'
        yield f'<text x="{_LEFT + 36}" y="{at}">{escape(curve.name)}</text>'


class _Scale:
    """Where a value lies between two ends, by its logarithm; whole decades."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self._low = floor(log10(min(values)))
        self._high = max(ceil(log10(max(values))), self._low + 1)
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        """The coordinate of a value."""
        share = (log10(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def decades(self) -> Iterator[float]:
        """The values at which a line of the grid stands."""
        return (10.0**power for power in range(self._low, self._high + 1))


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds * 1e6:g} us"
