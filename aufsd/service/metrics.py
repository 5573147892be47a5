"""Prometheus metrics. Calls are counted when they end; all else is read when metrics are asked for.

No layer id is a label: each time series costs memory, and the number of ids has no limit.
Rendering reads memory, /proc and one statvfs, and takes no lock. The table's lock has no metric,
because nobody ever waits for it (table.py). Calls wait for the mount thread, which has metrics.

prometheus_client would take 3.6 ms for the text when all methods have been called; a poll should
take less than 1 ms. So the text is written here, and the tests read it with that package's parser.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, Literal

from aufsd import results
from aufsd.service.log import RateLimit

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
# seconds: a counted get takes tens of microseconds, a debootstrap root seconds
_BUCKETS: Final = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0)

# texts rendered at once, before the limit of one a second
_FRESH = 30


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name with `aufsd_` or `process_`, and a value for each set of labels."""

    name: str
    kind: Literal["counter", "gauge"]
    text: str
    samples: Mapping[str, float]


def gauge(name: str, text: str, samples: float | Mapping[str, float]) -> Family:
    """A value that goes up and down."""
    return Family(name, "gauge", text, samples if isinstance(samples, Mapping) else {"": samples})


def counter(name: str, text: str, samples: float | Mapping[str, float]) -> Family:
    """A value that only grows; its name ends in _total."""
    return Family(name, "counter", text, samples if isinstance(samples, Mapping) else {"": samples})


def labels(**values: str) -> str:
    """Labels, in the form that follows a metric's name."""
    pairs = (f'{name}="{_escape(value)}"' for name, value in values.items())
    return f"{{{','.join(pairs)}}}"


def by(label: str, counts: Mapping[str, float]) -> dict[str, float]:
    """Samples that differ in one label."""
    return {labels(**{label: value}): count for value, count in counts.items()}


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


@dataclass(slots=True)
class _Histogram:
    """Durations of one method. `prefixes` are its samples' names, made once."""

    prefixes: tuple[str, ...]
    counts: list[int] = field(default_factory=lambda: [0] * (len(_BUCKETS) + 1))
    seconds: float = 0.0

    def lines(self) -> Iterator[str]:
        cumulated = list(accumulate(self.counts))
        values = (*cumulated, cumulated[-1], self.seconds)
        return (f"{prefix}{value}" for prefix, value in zip(self.prefixes, values, strict=True))


def _histogram(method: str) -> _Histogram:
    name = "aufsd_call_seconds"
    bounds = [*map(str, _BUCKETS), "+Inf"]
    buckets = (f"{name}_bucket{labels(method=method, le=bound)} " for bound in bounds)
    tail = (f"{name}_{part}{labels(method=method)} " for part in ("count", "sum"))
    return _Histogram((*buckets, *tail))


class Metrics:
    """`observe` counts a call that has ended. `render` reads the watched sources."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str]] = Counter()
        self._seconds: dict[str, _Histogram] = {}
        self._sources: list[Callable[[], Iterable[Family]]] = []
        self._last: results.Metrics | None = None
        self._fresh = RateLimit(_FRESH, 1.0)

    def observe(self, method: str, outcome: str, seconds: float) -> None:
        """One call has ended; `outcome` is `ok`, `cancelled` or the error's name."""
        self._calls[method, outcome] += 1
        histogram = self._seconds.get(method)
        if histogram is None:
            histogram = self._seconds[method] = _histogram(method)
        histogram.counts[bisect_left(_BUCKETS, seconds)] += 1
        histogram.seconds += seconds

    def watch(self, *sources: Callable[[], Iterable[Family]]) -> None:
        """Read these sources at every `render`."""
        self._sources += sources

    def render(self) -> results.Metrics:
        """The text exposition.

        Who asks more often than a poller does gets the last one again, up to a second old.
        """
        now = time.monotonic()
        if self._last is None or self._fresh.allows(0, now):
            self._last = results.Metrics(CONTENT_TYPE, "\n".join(self._lines()) + "\n")
        return self._last

    def _lines(self) -> Iterator[str]:
        calls = {
            labels(method=method, outcome=outcome): float(count)
            for (method, outcome), count in self._calls.items()
        }
        yield from _family(counter("aufsd_calls_total", "Calls answered", calls))
        # These two are there from the start, at 0. Prometheus's increase() needs an earlier value,
        # which the series of an outcome does not have.
        for name, text, outcome in (
            ("aufsd_incidents_total", "Calls that failed unexpectedly", "InternalError"),
            ("aufsd_calls_overloaded_total", "Calls beyond a limit", "Overloaded"),
        ):
            count = sum(n for (_, ended), n in self._calls.items() if ended == outcome)
            yield from _family(counter(name, text, count))
        yield "# HELP aufsd_call_seconds Time from a call's line to its answer"
        yield "# TYPE aufsd_call_seconds histogram"
        for histogram in self._seconds.values():
            yield from histogram.lines()
        unread = 0
        for source in self._sources:
            try:
                families = list(source())
            except OSError:
                # no descriptor is left for /proc, for example; the rest is still worth having
                unread += 1
                continue
            for family in families:
                yield from _family(family)
        text = "Groups of these metrics that could not be read this time"
        yield from _family(gauge("aufsd_metrics_unread", text, unread))


def _family(family: Family) -> Iterator[str]:
    yield f"# HELP {family.name} {family.text}"
    yield f"# TYPE {family.name} {family.kind}"
    for its_labels, value in family.samples.items():
        yield f"{family.name}{its_labels} {value}"
