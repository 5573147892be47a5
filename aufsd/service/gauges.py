"""The metrics that are read when asked for: store, table, archive jobs, connections, process."""

import os
import platform
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from aufsd import __version__
from aufsd.active.mounts import Mounts
from aufsd.active.refs import State
from aufsd.active.replay import DIFFERENCES
from aufsd.archive.jobs import Jobs
from aufsd.kernel.peer import process as identity
from aufsd.service.metrics import Family, by, counter, gauge, labels
from aufsd.status import Overview
from aufsd.store.layers import Store
from aufsd.store.recovery import ACTIONS, Recovered

Source = Callable[[], Iterator[Family]]

_STATUS = {"ok": 0, "degraded": 1, "failing": 2}
# kinds with a series at 0 from the start; another kind gets one with its first job
_JOBS = ("diff", "apply_diff", "diff_size", "usage", "changes", "clone", "convert")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def build(backend: str) -> Source:
    """Which program this is, and since when."""
    found = labels(
        version=__version__,
        backend=backend,
        python=platform.python_version(),
        kernel=platform.release(),
    )

    started = time.time()

    def collect() -> Iterator[Family]:
        yield gauge("aufsd_build_info", "What runs; always 1", {found: 1})
        yield gauge("aufsd_start_time_seconds", "When it began to serve, since the epoch", started)

    return collect


def store(layers: Store, overview: Overview, recovered: list[Recovered]) -> Source:
    """What is on disk, and how well all is."""

    def collect() -> Iterator[Family]:
        # more may be repaired after the start, in the background
        actions = Counter(step.action for step in recovered)
        done = by("action", {action: actions[action] for action in ACTIONS})
        yield gauge("aufsd_layers", "Layers in the store", len(layers.parent))
        yield gauge("aufsd_layers_quarantined", "Damaged layers", len(layers.damaged))
        yield gauge(
            "aufsd_removals_left",
            "Removed layers whose content could not be deleted",
            layers.undeleted,
        )
        yield counter("aufsd_recovery_actions_total", "What was cut off and put right", done)
        try:
            found = os.statvfs(layers.layout.root)
        except OSError:
            pass  # the health check "space" says why
        else:
            block = found.f_frsize
            yield gauge("aufsd_store_size_bytes", "Space of the store", found.f_blocks * block)
            yield gauge("aufsd_store_free_bytes", "Space free to root", found.f_bavail * block)
            yield gauge("aufsd_store_inodes", "Inodes of the store, 0 if endless", found.f_files)
            yield gauge("aufsd_store_free_inodes", "Inodes free", found.f_favail)
        checks = overview.health().checks
        yield gauge(
            "aufsd_health_status",
            "What health says, check by check: 0 ok, 1 degraded, 2 failing",
            by("check", {check.name: _STATUS[check.status] for check in checks}),
        )

    return collect


def mounts(active: Mounts) -> Source:
    """The table, and the thread that mounts."""

    def collect() -> Iterator[Family]:
        # one pass, as short as can be: a thousand mounts are common
        mounted = {active.backend.name: 0}
        manual = busy = 0
        processes = []
        for entry in active.table.entries.values():
            if entry.stands:
                mounted[entry.backend] = mounted.get(entry.backend, 0) + 1
                if not entry.references and entry.state is State.ACTIVE:
                    busy += 1
            for reference in entry.references:
                if reference.hold == "process":
                    processes.append((reference.pid, reference.start))
                else:
                    manual += 1
        references = by("hold", {"manual": manual, "process": len(processes)})
        yield gauge("aufsd_mounts", "Mounted unions", by("backend", mounted))
        yield gauge("aufsd_references", "References", references)
        yield gauge("aufsd_holders", "Processes that hold references", len(set(processes)))
        yield gauge("aufsd_mounts_busy", "Mounts that stay busy without a reference", busy)
        for name, text, value in (
            ("mounts_made", "Mounts made", active.counters.mounts),
            ("mounts_failed", "Mounts that failed", active.counters.failed_mounts),
            ("mounts_vanished", "Mounts that others unmounted", active.counters.vanished_mounts),
            ("unmounts", "Unmounts made", active.counters.unmounts),
            ("unmount_busy_retries", "Unmounts repeated after EBUSY", active.counters.busy_retries),
            ("mount_busy_retries", "Mounts repeated after EBUSY", active.counters.busy_mounts),
            ("processes_ended", "Processes that ended holding", active.processes.ends),
        ):
            yield counter(f"aufsd_{name}_total", text, value)
        yield counter(
            "aufsd_start_differences_total",
            "Where the table's journal and the kernel did not agree at the start",
            by("kind", {kind: active.counters.differences[kind] for kind in DIFFERENCES}),
        )
        thread = active.thread
        yield gauge("aufsd_mount_thread_queue", "Calls that wait for the thread", thread.queued)
        yield gauge(
            "aufsd_mount_thread_running_seconds",
            "How long the thread's present call has been running, 0 if none",
            thread.running_seconds,
        )
        yield counter("aufsd_mount_thread_calls_total", "Calls that the thread made", thread.calls)
        yield counter(
            "aufsd_mount_thread_wait_seconds_total", "Time waited for it", thread.wait_seconds
        )
        yield counter(
            "aufsd_mount_thread_busy_seconds_total", "Time spent in its calls", thread.busy_seconds
        )

    return collect


def archives(jobs: Jobs) -> Source:
    """The children that work on layers' content."""

    def collect() -> Iterator[Family]:
        running = jobs.running()
        moved_bytes, moved_entries = jobs.done_bytes.copy(), jobs.done_entries.copy()
        for job in running:
            moved_bytes[job.kind] += job.bytes
            moved_entries[job.kind] += job.entries
        yield gauge("aufsd_jobs_running", "Archive jobs that run", len(running))
        yield gauge("aufsd_jobs_waiting", "Archive jobs that wait for another's end", jobs.waiting)
        ended = by("kind", {**dict.fromkeys(_JOBS, 0), **jobs.done})
        yield counter("aufsd_jobs_total", "Archive jobs that ended", ended)
        yield counter(
            "aufsd_archive_bytes_total",
            "Bytes of tars written and read",
            by("kind", {kind: moved_bytes[kind] for kind in ("diff", "apply_diff")}),
        )
        yield counter(
            "aufsd_archive_entries_total",
            "Entries of tars written and read",
            by("kind", {kind: moved_entries[kind] for kind in ("diff", "apply_diff")}),
        )

    return collect


class Statistics(Protocol):
    """aufsd.rpc.admission.Statistics, which this module must not import: it is above it."""

    @property
    def connections(self) -> int: ...
    @property
    def accepted(self) -> int: ...
    @property
    def refused(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def dropped(self) -> Mapping[str, int]: ...


def edge(statistics: Callable[[], Statistics]) -> Source:
    """Who is connected."""
    reasons = dict.fromkeys(("descriptors", "http", "memory", "overlong", "slow"), 0)

    def collect() -> Iterator[Family]:
        found = statistics()
        dropped = by("reason", {**reasons, **found.dropped})
        yield gauge("aufsd_connections", "Connections", found.connections)
        yield counter("aufsd_connections_accepted_total", "Connections let in", found.accepted)
        yield counter("aufsd_connections_refused_total", "Connections refused", found.refused)
        yield gauge("aufsd_calls_in_flight", "Calls that run", found.in_flight)
        yield counter("aufsd_peers_dropped_total", "Peers that misbehaved, dropped", dropped)

    return collect


def process() -> Source:
    """The daemon as a process, under the names that every Prometheus client uses."""
    ticks = identity(os.getpid())[1] / os.sysconf("SC_CLK_TCK")
    started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks

    def collect() -> Iterator[Family]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        with open("/proc/self/statm", "rb") as file:
            size, resident, *_ = map(int, file.read().split())
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        yield counter("process_cpu_seconds_total", "CPU time", usage.ru_utime + usage.ru_stime)
        yield gauge("process_resident_memory_bytes", "Resident memory", resident * _PAGE)
        yield gauge("process_virtual_memory_bytes", "Virtual memory", size * _PAGE)
        yield gauge("process_start_time_seconds", "Start, since the epoch", started)
        yield gauge("process_open_fds", "Open file descriptors", _descriptors())
        yield gauge("process_max_fds", "Descriptors at most", limit)

    return collect


def _descriptors() -> int:
    # the size of this directory is their number, since Linux 6.2 (fs/proc/fd.c, proc_fd_getattr)
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
