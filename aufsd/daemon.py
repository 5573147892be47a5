"""The daemon's life: the rooms put together, served, drained, and taken apart again.

Start: lock the store, recover, choose a backend, replay the table, listen, READY. Removed content
is deleted after READY. Stop: take no new calls, let running ones end, leave mounts as they are.
"""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
import trio

from aufsd import config as configuration
from aufsd import journal
from aufsd.archive.jobs import open_jobs
from aufsd.archive.requests import Limits
from aufsd.config import Config
from aufsd.driver import Driver, erase_removed
from aufsd.idmap import to_host
from aufsd.journal import Journal
from aufsd.kernel import probe
from aufsd.mounts import open_mounts
from aufsd.rpc import server
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
