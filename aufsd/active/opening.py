"""The mounts of a store as the daemon starts: the table replayed, the watches and retries begun."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
import trio

from aufsd.active.mounts import Mounts
from aufsd.active.refs import Entry
from aufsd.active.replay import replay
from aufsd.active.table import Table
from aufsd.active.watch import HelperWatch
from aufsd.store.ids import LayerId
from aufsd.tasks import Tasks
from aufsd.union.backend import Backend

log = structlog.get_logger(__name__)


@asynccontextmanager
async def open_mounts(
    table: Table, backend: Backend, recorded: dict[LayerId, Entry], tasks: Tasks
) -> AsyncIterator[Mounts]:
    """The mounts of a store, with their background tasks; what is mounted stays so after."""
    async with trio.open_nursery() as nursery:
        watches = tasks.add("watches", "the end of each process that counts is noticed")
        helpers = HelperWatch(backend, table, nursery, watches)
        mounts = Mounts(table.store, backend, table, nursery, helpers)
        for note in await mounts.thread.run(replay, table, recorded, backend):
            log.warning(
                "table and kernel did not agree", id=note.id, kind=note.kind, note=note.text
            )
            mounts.counters.differences[note.kind] += 1
        for id, entry in list(table.entries.items()):
            helpers.mounted(id)
            for reference in entry.references:
                if reference.hold == "process":
                    mounts.processes.holds(reference)
        retries = tasks.add("retries", "unmounts that stayed busy are tried again")
        nursery.start_soon(retries.repeat, mounts.retry_busy)
        try:
            yield mounts
        finally:
            nursery.cancel_scope.cancel()
            mounts.thread.close()
            mounts.changes.close()
