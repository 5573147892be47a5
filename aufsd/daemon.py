"""The daemon's life: the rooms put together, served, drained, and taken apart again.

Start: lock the store, recover, choose a backend, replay the table, listen, READY. Removed content
is deleted after READY. Stop: take no new calls, let running ones end, leave mounts as they are.
"""

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import structlog
import trio

from aufsd import config as configuration
from aufsd import journal
from aufsd.archive.jobs import open_jobs
from aufsd.archive.requests import Limits
from aufsd.config import Config, ConfigError
from aufsd.driver import Driver, erase_removed
from aufsd.idmap import to_host
from aufsd.journal import Journal
from aufsd.kernel import probe
from aufsd.mounts import open_mounts
from aufsd.rpc import listeners, server
from aufsd.rpc.calls import Kind
from aufsd.rpc.server import Allow, Listener, Server, Settings
from aufsd.service import log as logging
from aufsd.service.activation import inherited
from aufsd.service.metrics import Metrics, rooms
from aufsd.service.notify import Notifier, feed_watchdog
from aufsd.status import Overview
from aufsd.store import recovery
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store, open_store
from aufsd.store.recovery import Recovered
from aufsd.table import Table
from aufsd.threads import Disk
from aufsd.union.backend import Backend
from aufsd.union.choice import choose

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Opened:
    """A store that is locked, recovered and has a backend; made before the event loop runs."""

    store: Store
    backend: Backend
    recovered: list[Recovered]
    warnings: list[str]


def open_root(config: Config) -> Opened:
    """Lock and recover the store, and find the backend for it. Synchronous.

    Raises StoreLocked, StoreNotAdopted, IncompatibleFilesystem, BackendUnsupported, OSError.
    """
    for path in (config.root, config.state_dir):
        if not os.path.isdir(path):
            os.mkdir(path, 0o755)
    root = os.path.realpath(config.root)
    store = open_store(
        root,
        adopt=config.adopt,
        sync=config.sync,
        uid=to_host(config.uid_maps, 0) or 0,
        gid=to_host(config.gid_maps, 0) or 0,
        xattr_namespace="user" if probe.in_user_namespace() else "trusted",
    )
    try:
        recovered = recovery.recover(store)
        for step in recovered:
            log.warning("recovered", action=step.action, what=step.what, name=step.name)
        choice = choose(config.backend, store.format.backend, store.layout)
        for warning in choice.warnings:
            log.warning("backend", warning=warning)
        store.set_backend(choice.backend.name)
    except BaseException:
        store.close()
        raise
    return Opened(store, choice.backend, recovered, list(choice.warnings))


@asynccontextmanager
async def open_driver(opened: Opened, config: Config, metrics: Metrics) -> AsyncIterator[Driver]:
    """The driver over an opened store, with its background tasks, until the block is left."""
    store, backend = opened.store, opened.backend
    book_path = f"{config.state_dir}/mounts.journal"
    recorded = journal.read(book_path, store.layout.root)
    table = Table(store, Journal(book_path, store.layout.root, recorded))
    limits = Limits(bytes=config.max_layer_bytes, entries=config.max_layer_entries)
    driver: Driver | None = None

    async def prepare(chain: tuple[LayerId, ...]) -> None:
        assert driver is not None, "nothing is mounted before the driver stands"
        await driver.prepare(chain)

    try:
        async with (
            open_jobs(
                store.layout,
                uid_maps=config.uid_maps,
                gid_maps=config.gid_maps,
                limits=limits,
                max_jobs=config.max_jobs,
                sync=config.sync,
                acls=config.acls,
                xattr_namespace=store.xattr_namespace,
            ) as jobs,
            open_mounts(table, backend, prepare, recorded) as unions,
            trio.open_nursery() as nursery,
        ):
            backing = probe.ground(store.layout.private).kind
            overview = Overview(store, backend, unions, jobs, backing, opened.warnings)
            metrics.watch(rooms(store, unions, jobs, opened.recovered))
            driver = Driver(
                store=store,
                backend=backend,
                unions=unions,
                jobs=jobs,
                disk=Disk(),
                overview=overview,
                render_metrics=metrics.render,
                convert_policy=config.convert,
                erase=trio.Event(),
            )
            driver.erase.set()  # what the last run, or a crash, left to be deleted
            nursery.start_soon(erase_removed, driver)
            try:
                yield driver
            finally:
                nursery.cancel_scope.cancel()
    finally:
        table.journal.close()


def serve(config: Config, reload: Callable[[], Config]) -> int:
    """Run the daemon until it is told to stop; its exit status. `reload` reads the file again.

    Raises what `open_root` raises, and OSError for sockets that cannot be had.
    """
    logging.configure(config.log_level, json=_json(config))
    # descriptors of the caller's working directory and umask must not decide anything
    os.umask(0o022)
    os.chdir("/")
    opened = open_root(config)
    try:
        trio.run(_serve, opened, config, reload)
    finally:
        opened.store.close()
    return 0


async def _serve(opened: Opened, config: Config, reload: Callable[[], Config]) -> None:
    notifier = Notifier()
    metrics = Metrics()
    sockets = _listen(config)
    shutdown = trio.Event()
    try:
        async with (
            open_driver(opened, config, metrics) as driver,
            trio.open_nursery() as background,
        ):
            background.start_soon(feed_watchdog, notifier, driver.unions.breathe)
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
                background.start_soon(_signals, shutdown, running, notifier, reload)
                notifier.tell("READY=1", f"STATUS={_state(driver)}")
                log.info("ready", backend=driver.backend.name, layers=len(driver.store.parent))
                await shutdown.wait()
                notifier.tell("STOPPING=1", "STATUS=draining; mounts stay")
            background.cancel_scope.cancel()
    finally:
        for listener in sockets:
            listener.close()
    log.info("stopped")


async def _signals(
    shutdown: trio.Event, running: Server, notifier: Notifier, reload: Callable[[], Config]
) -> None:
    """SIGTERM and SIGINT drain and stop; SIGHUP reads the configuration again. Endless."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
        async for number in received:
            if number != signal.SIGHUP:
                shutdown.set()
                continue
            notifier.reloading()
            try:
                config = reload()
            except ConfigError as error:
                log.error("configuration is not reloaded", error=str(error))
            else:
                # what else changes counts from the next start on
                running.settings = _settings(config)
                logging.configure(config.log_level, json=_json(config))
                log.info("configuration reloaded")
            notifier.tell("READY=1")


def _listen(config: Config) -> list[Listener]:
    """The two sockets: systemd's where it passed them, else our own."""
    passed = inherited()
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
            found.append(listeners.bind(path, monitor=monitor))
    return found


def _settings(config: Config) -> Settings:
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
    return Settings(
        max_connections=config.max_connections,
        max_connections_per_user=config.max_connections_per_uid,
        drain_timeout=config.drain_timeout,
        allow=allow,
    )


def _state(driver: Driver) -> str:
    entries = driver.unions.table.entries
    return f"{driver.backend.name}, {len(driver.store.parent)} layers, {len(entries)} in use"


def _json(config: Config) -> bool | None:
    return None if config.log_format == "auto" else config.log_format == "json"
