"""Opens the mounts of a store when the daemon starts.

It replays the table, and begins to watch processes and to retry busy unmounts.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import structlog
import trio

from aufsd.active import clearing, observed
from aufsd.active.mounts import Mounts
from aufsd.active.refs import BIND, Entry
from aufsd.active.remount import make_up
from aufsd.active.replay import Finding, replay, settle
from aufsd.active.table import Table
from aufsd.active.watch import HelperWatch
from aufsd.store.ids import LayerId
from aufsd.tasks import Tasks
from aufsd.union.backend import Backend

log = structlog.get_logger(__name__)


def _tell(mounts: Mounts, findings: Sequence[Finding]) -> None:
    for finding in findings:
        log.warning(
            "table and kernel did not agree", id=finding.id, kind=finding.kind, note=finding.text
        )
        mounts.counters.differences[finding.kind] += 1


def _watch(mounts: Mounts, id: LayerId) -> None:
    """Watch the helper of a layer's mount, and the processes that hold references."""
    mounts.helpers.watch(id)
    for reference in mounts.table.entries[id].references:
        if reference.hold == "process":
            mounts.processes.watch(reference)


async def _settle(mounts: Mounts, id: LayerId, recorded: Entry | None, kept: Entry | None) -> None:
    """Try again to settle a layer that could not be settled at the start.

    `kept` is its entry in the table since then. Raises what `settle` does; the entry stays.
    """
    table, layout = mounts.table, mounts.store.layout
    await table.claim(id)
    try:
        if table.entries.get(id) is not kept:
            # a call has settled it meanwhile
            return
        rows = await mounts.thread.run(observed.rows_at, layout)
        entry, findings = await mounts.thread.run(
            settle, table, mounts.backend, id, recorded, rows.get(id, [])
        )
        with table.locked():
            if entry is None:
                table.leave(id)
            else:
                table.enter(id, entry)
                _watch(mounts, id)
            table.record(id)
        _tell(mounts, findings)
    finally:
        table.end(id)


@asynccontextmanager
async def open_mounts(
    table: Table, backend: Backend, recorded: dict[LayerId, Entry], tasks: Tasks
) -> AsyncIterator[Mounts]:
    """The mounts of a store, with their background tasks. Leaving the block unmounts nothing."""
    async with trio.open_nursery() as nursery:
        watches = tasks.add("watches", "the end of each process that counts is noticed")
        helpers = HelperWatch(backend, table, nursery, watches)
        remounts = tasks.add("remounts", "no mount is taken away and not made again")
        mounts = Mounts(table.store, backend, table, nursery, helpers, remounts)
        found = await mounts.thread.run(replay, table, recorded, backend)
        _tell(mounts, found.findings)
        for id in list(table.entries):
            _watch(mounts, id)
        settling = tasks.add("replay", "what stood when the daemon started is counted")
        for id, error in found.unsettled.items():
            settling.failed(id, error)
            again = partial(_settle, mounts, id, recorded.get(id), table.entries.get(id))
            nursery.start_soon(settling.until_done, again, id)
        for id, entry in table.entries.items():
            if entry.unmounted and entry.backend in (backend.name, BIND):
                nursery.start_soon(make_up, mounts, id)
        retries = tasks.add("retries", "unmounts that stayed busy are tried again")
        nursery.start_soon(retries.repeat, partial(clearing.retry_busy, mounts))
        try:
            yield mounts
        finally:
            nursery.cancel_scope.cancel()
            mounts.thread.close()
            mounts.changes.close()
