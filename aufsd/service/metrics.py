"""Prometheus metrics: counted where calls end, or read from the rooms when they are asked for.

No layer id is ever a label: a store has as many ids as it likes, a time series costs memory.
Rendering reads memory and one statvfs; it takes no lock.
"""

import os
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from aufsd import __version__, answers
from aufsd.archive.jobs import Jobs
from aufsd.mounts import Mounts
from aufsd.store.layers import Store
from aufsd.store.recovery import Recovered

# seconds: a counted get takes tens of microseconds, a debootstrap root seconds
_BUCKETS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 120)


class Metrics:
    """One registry. `observe` is called when a call ends; the rest is read at `render`."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._calls = Counter(
            "aufsd_calls", "Calls answered", ("method", "outcome"), registry=self._registry
        )
        self._seconds = Histogram(
            "aufsd_call_seconds",
            "Time from a call's line to its answer",
            ("method",),
            buckets=_BUCKETS,
            registry=self._registry,
        )

    def observe(self, method: str, outcome: str, seconds: float) -> None:
        """One call has ended; `outcome` is `ok` or the error's name."""
        self._calls.labels(method, outcome).inc()
        self._seconds.labels(method).observe(seconds)

    def watch(self, *sources: Callable[[], Iterable[Metric]]) -> None:
        """Have these read at every `render`."""
        for source in sources:
            self._registry.register(_Source(source))

    def render(self) -> answers.Metrics:
        """The text exposition."""
        return answers.Metrics(CONTENT_TYPE_LATEST, generate_latest(self._registry).decode())


class _Source(Collector):
    """prometheus_client wants an object with `collect`."""

    def __init__(self, source: Callable[[], Iterable[Metric]]) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        return self._source()


def rooms(
    store: Store, unions: Mounts, jobs: Jobs, recovered: list[Recovered]
) -> Callable[[], Iterator[Metric]]:
    """What the store, the table and the archive jobs are like now."""

    def collect() -> Iterator[Metric]:
        table = unions.table
        counters = unions.counters
        yield _labelled(
            "aufsd_build_info",
            "Version",
            ("version", "backend"),
            (__version__, unions.backend.name),
        )
        yield GaugeMetricFamily("aufsd_layers", "Layers in the store", len(store.parent))
        yield GaugeMetricFamily("aufsd_layers_quarantined", "Damaged layers", len(store.damaged))
        mounts = GaugeMetricFamily("aufsd_mounts", "Mounted unions", labels=("backend",))
        by_backend: dict[str, int] = {unions.backend.name: 0}
        for entry in table.entries.values():
            if entry.union:
                by_backend[entry.backend] = by_backend.get(entry.backend, 0) + 1
        for backend, count in by_backend.items():
            mounts.add_metric((backend,), count)
        yield mounts
        held = [ref.hold for entry in table.entries.values() for ref in entry.references]
        references = GaugeMetricFamily("aufsd_references", "References", labels=("hold",))
        for hold in ("manual", "process"):
            references.add_metric((hold,), held.count(hold))
        yield references
        yield GaugeMetricFamily(
            "aufsd_mounts_busy", "Mounts without a reference that stay busy", len(table.busy())
        )
        yield GaugeMetricFamily(
            "aufsd_mount_thread_queue", "Calls that wait for the mount thread", unions.thread.queued
        )
        for name, text, value in (
            ("mounts_made", "Mounts made", counters.mounts),
            ("mounts_failed", "Mounts that failed", counters.failed_mounts),
            ("mounts_vanished", "Mounts unmounted behind our back", counters.vanished_mounts),
            ("unmounts", "Unmounts made", counters.unmounts),
            ("unmount_busy_retries", "Unmounts tried again after EBUSY", counters.busy_retries),
            ("processes_ended", "Processes that ended holding", counters.processes_ended),
            ("recovery_actions", "What recovery did at start", len(recovered)),
        ):
            yield CounterMetricFamily(f"aufsd_{name}", text, value)
        running = jobs.running()
        yield GaugeMetricFamily("aufsd_jobs_running", "Archive jobs that run now", len(running))
        found = os.statvfs(store.layout.root)
        yield GaugeMetricFamily(
            "aufsd_store_free_bytes", "Space free to root", found.f_bavail * found.f_frsize
        )
        yield GaugeMetricFamily("aufsd_store_free_inodes", "Inodes free", found.f_favail)
        yield GaugeMetricFamily(
            "aufsd_descriptors", "Open file descriptors", len(os.listdir("/proc/self/fd"))
        )

    return collect


def _labelled(
    name: str, text: str, names: tuple[str, ...], values: tuple[str, ...]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=names)
    family.add_metric(values, 1)
    return family
