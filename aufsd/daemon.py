"""The daemon: starts, serves, reloads, drains and stops.

Start: lock the store, recover, choose a backend, replay the table, listen, READY. Removed content
is deleted after READY. Stop: take no new calls, let running calls end, leave all mounts.
"""

import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import structlog
import trio

from aufsd import config as configuration
from aufsd.active import journal
from aufsd.active.in_use import HolderLookup
from aufsd.active.journal import Journal
from aufsd.active.opening import open_mounts
from aufsd.active.table import Table
from aufsd.archive.jobs import open_jobs
from aufsd.archive.requests import Limits
from aufsd.config import Config, ConfigError
from aufsd.driver import Driver
from aufsd.kernel import probe
from aufsd.layers.access import Access
from aufsd.layers.background import Upkeep
from aufsd.layers.branches import Chains
from aufsd.layers.checkpoints import Checkpoints, DirectoryCheckpoints
from aufsd.layers.content import Content
from aufsd.layers.directories import Directories
from aufsd.layers.snapshots import Snapshots
from aufsd.layers.squash import Squashes
from aufsd.layers.subvolumes import SnapshotCheckpoints
from aufsd.root import Opened, open_patiently
from aufsd.rpc import listeners, server
from aufsd.rpc.calls import Kind
from aufsd.rpc.server import Allow, Listener, Server, ServerSettings
from aufsd.service import exporter, gauges, notify
from aufsd.service import log as logging
from aufsd.service.activation import inherited
from aufsd.service.metrics import Metrics
from aufsd.service.notify import Notifier
from aufsd.status import Overview
from aufsd.tasks import Task, Tasks, leaves
from aufsd.threads import Disk
from aufsd_client.errors import AufsdError

log = structlog.get_logger(__name__)


@asynccontextmanager
async def open_driver(
    opened: Opened, config: Config, metrics: Metrics, tasks: Tasks
) -> AsyncIterator[Driver]:
    """The driver over an opened store, with its background tasks, until the block is left."""
    store, backend = opened.store, opened.backend
    recorded, damage = journal.read(opened.state, opened.owner)
    if damage:
        log.warning("journal", problem=damage)
        opened.warnings.append(damage)
    table = Table(store, Journal(opened.state, opened.owner, recorded))
    limits = Limits(bytes=config.max_layer_bytes, entries=config.max_layer_entries)
    try:
        async with (
            open_jobs(
                store.layout,
                uid_maps=config.uid_maps,
                gid_maps=config.gid_maps,
                limits=limits,
                max_jobs=config.max_jobs,
                stream_timeout=config.stream_timeout,
                sync=config.sync,
                acls=config.acls,
                xattr_namespace=store.xattr_namespace,
                node_whiteouts=backend.node_whiteouts,
                held=(store.jobs_fd,),
            ) as jobs,
            open_mounts(table, backend, recorded, tasks) as active,
            trio.open_nursery() as nursery,
        ):
            backing = probe.kind(store.layout.root)
            overview = Overview(store, backend, active, jobs, backing, tasks, opened.warnings)
            metrics.watch(
                gauges.build(backend.name),
                gauges.store(store, overview, opened.recovered),
                gauges.mounts(active),
                gauges.archives(jobs),
                gauges.process(),
            )
            disk = Disk()
            upkeep = Upkeep(store, table, jobs, disk, opened.recovered, tasks)
            chains = Chains(store, backend, table, disk, upkeep, config.convert)
            content: Content
            checkpoints: Checkpoints
            if backend.snapshots:
                checkpoints = SnapshotCheckpoints(active, jobs, disk, upkeep.deletion_due)
                content = Snapshots(store, jobs, disk, table, upkeep.deletion_due, config.selinux)
            else:
                checkpoints = DirectoryCheckpoints(active, chains, disk, upkeep.deletion_due)
                content = Directories(
                    store, backend, table, jobs, disk, chains, upkeep.deletion_due
                )
            driver = Driver(
                store=store,
                backend=backend,
                active=active,
                jobs=jobs,
                disk=disk,
                overview=overview,
                render_metrics=metrics.render,
                access=Access(active, chains, content, disk),
                chains=chains,
                content=content,
                checkpoints=checkpoints,
                squashes=Squashes(active, chains, jobs, disk, upkeep.deletion_due),
                deletion_due=upkeep.deletion_due,
                upkeep=upkeep,
                holder_lookup=HolderLookup(store.layout, active.scans),
            )
            nursery.start_soon(upkeep.run)
            try:
                yield driver
            finally:
                nursery.cancel_scope.cancel()
    finally:
        table.journal.close()


def serve(config: Config, reload: Callable[[], Config]) -> int:
    """Run the daemon until it is told to stop. Its exit status. `reload` reads the file again.

    Raises what `open_patiently` does, OSError for sockets that cannot be had, and KeyboardInterrupt
    for a SIGINT while the store is opened.
    """
    # a SIGHUP waits until it can be handled
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    logging.configure(config.log_level, json=_json(config))
    # the caller's umask and working directory must not matter
    os.umask(0o022)
    # Every connection, job and process with references takes descriptors. The soft limit of 1024 is
    # there for select(2), which nothing here calls (systemd.exec(5), LimitNOFILE=).
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.chdir("/")
    with Notifier() as notifier:
        notifier.tell(f"STATUS=opening the store at {config.root}")
        opened = open_patiently(config, notifier)
        try:
            trio.run(_run, opened, config, reload, notifier)
        except Exception as error:
            # a nursery raises a group; the operator is told its first error
            first = next(leaves(error))
            if isinstance(first, AufsdError | OSError):
                raise first from None
            log.critical("a fault of aufsd has ended it", exc_info=error)
            return 1
        finally:
            # the daemon is stopping already
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            opened.close()
    return 0


async def _run(
    opened: Opened, config: Config, reload: Callable[[], Config], notifier: Notifier
) -> None:
    """Receive signals from before the first task until after the last."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        try:
            await _serve(opened, config, reload, notifier, received)
        finally:
            # the old handlers are back, one of which raises; block until `serve` ignores the
            # signals
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


async def _serve(
    opened: Opened,
    config: Config,
    reload: Callable[[], Config],
    notifier: Notifier,
    received: AsyncIterator[int],
) -> None:
    metrics = Metrics()
    tasks = Tasks()
    shutdown = trio.Event()
    sockets = _listen(config)
    try:
        scrapes = _listen_for_scrapes(config)
        async with (
            open_driver(opened, config, metrics, tasks) as driver,
            trio.open_nursery() as background,
        ):
            async with trio.open_nursery() as serving:
                serve_api = partial(
                    server.serve,
                    sockets,
                    driver,
                    _settings(config),
                    shutdown=shutdown,
                    observe=metrics.observe,
                )
                running: Server = await serving.start(serve_api)
                metrics.watch(gauges.edge(running.statistics))
                if scrapes is not None:
                    task = tasks.add("scrapes", "scrapes are answered")
                    background.start_soon(exporter.serve, scrapes, metrics.render, task)
                signals = Signals(config, reload, State(driver, running, shutdown), notifier)
                task = tasks.add("configuration", "the configuration that was last read holds")
                background.start_soon(signals.heed, received, task)
                notifier.tell("READY=1", f"STATUS={signals.state}")
                if notifier.listening:
                    task = tasks.add("notify", "the service manager hears the daemon")
                    told = partial(str, signals.state)
                    background.start_soon(
                        notify.report, notifier, driver.active.prove_alive, told, task
                    )
                log.info("ready", backend=driver.backend.name, layers=len(driver.store.parent))
                await shutdown.wait()
                notifier.tell("STOPPING=1", f"STATUS={signals.state}")
            background.cancel_scope.cancel()
    finally:
        for listener in sockets:
            listener.close()
    log.info("stopped")


@dataclass(slots=True)
class State:
    """The state for the service manager; `str` gives the line of `systemctl status`."""

    driver: Driver
    running: Server
    shutdown: trio.Event
    # for the operator, after a reload
    note: str = ""

    def __str__(self) -> str:
        status = self.driver.status()
        parts = [
            f"{status.backend}: {status.layers} layers, {status.mounts} mounts, "
            f"{status.references} references, {len(status.jobs)} archives running",
            *status.degraded,
            *([self.note] if self.note else ()),
        ]
        if self.shutdown.is_set():
            calls = self.running.statistics().in_flight
            parts.insert(0, f"draining {calls} calls, mounts stay")
        return "; ".join(parts)


# keys whose new values count at once
RELOADED = frozenset(
    {
        *("max_connections", "max_connections_per_uid", "max_calls_per_uid", "max_jobs_per_uid"),
        *("drain_timeout", "read_users", "use_users", "change_users", "log_level", "log_format"),
    }
)


@dataclass(slots=True)
class Signals:
    """Handles signals. `config` is what the daemon was started with."""

    config: Config
    reload: Callable[[], Config]
    state: State
    notifier: Notifier

    async def heed(self, received: AsyncIterator[int], task: Task) -> None:
        """SIGTERM and SIGINT drain and stop; SIGHUP reads the configuration again. Endless."""
        async for number in received:
            if number == signal.SIGHUP:
                self.notifier.reloading()
                self._reload(task)
                self.notifier.tell("READY=1", f"STATUS={self.state}")
            elif self.state.shutdown.is_set():
                log.info("stopping already; running calls are cut off after drain_timeout")
            else:
                self.state.shutdown.set()

    def _reload(self, task: Task) -> None:
        """Take the file's new settings, or keep the old ones and report why."""
        self.state.note = ""
        try:
            found = self.reload()
            settings = _settings(found)
        except Exception as error:
            # whatever is wrong with the file, or with our reading of it, the daemon goes on
            expected = isinstance(error, ConfigError)
            log.error(
                "configuration is not reloaded",
                error=str(error),
                exc_info=None if expected else error,
            )
            task.failing[None] = f"the new configuration was not taken: {error}"
            return
        task.failing.clear()
        self.state.running.settings = settings
        logging.configure(found.log_level, json=_json(found))
        waiting = [
            key
            for key in found.__struct_fields__
            if key not in RELOADED and getattr(found, key) != getattr(self.config, key)
        ]
        if waiting:
            self.state.note = f"a restart is needed for {', '.join(waiting)}"
        log.info("configuration reloaded", restart_needed_for=waiting)


def _listen_for_scrapes(config: Config) -> socket.socket | None:
    address = configuration.metrics_address(config)
    return None if address is None else exporter.bind(*address)


def _listen(config: Config) -> list[Listener]:
    """The two sockets: systemd's where it passed them, else our own."""
    passed = inherited(("control", "monitor"))
    found = []
    for name, path, monitor in (
        ("control", config.socket, False),
        ("monitor", config.monitor_socket, True),
    ):
        if name in passed:
            sock = passed[name]
            sock.setblocking(False)
            found.append(Listener(sock, monitor))
        else:
            try:
                found.append(listeners.bind(path, monitor=monitor))
            except OSError as error:
                # bind(2) and connect(2) do not name the path
                error.filename = error.filename or path
                for listener in found:
                    listener.close()
                raise
    return found


def _settings(config: Config) -> ServerSettings:
    allow: dict[Kind, Allow] = {}
    kinds: tuple[tuple[Kind, tuple[str, ...]], ...] = (
        ("read", config.read_users),
        ("use", config.use_users),
        ("change", config.change_users),
    )
    for kind, names in kinds:
        allowed = configuration.allowed(names)
        if allowed is not None:
            allow[kind] = Allow(*map(tuple, allowed))
    return ServerSettings(
        max_connections=config.max_connections,
        max_connections_per_user=config.max_connections_per_uid,
        max_calls_per_user=config.max_calls_per_uid,
        max_archives_per_user=config.max_jobs_per_uid,
        drain_timeout=config.drain_timeout,
        allow=allow,
    )


def _json(config: Config) -> bool | None:
    return None if config.log_format == "auto" else config.log_format == "json"
