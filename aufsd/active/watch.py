"""Notices at once when a process ends that serves a union, or that holds references.

The next `get` mounts a union whose helper ended again, with its references; until then `health`
names it. The references of a process go with it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import structlog
import trio

from aufsd.active.processes import ended
from aufsd.active.refs import Reference, State
from aufsd.active.table import Table
from aufsd.store.ids import LayerId
from aufsd.tasks import Task
from aufsd.union.backend import Backend
from aufsd_client.errors import AufsdError

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class HelperWatch:
    """The helpers of one store's unions. `dead` are ids whose helper ended while it was mounted."""

    backend: Backend
    table: Table
    nursery: trio.Nursery
    task: Task
    dead: set[LayerId] = field(default_factory=set)
    deaths: int = 0
    _watched: set[tuple[LayerId, int, int]] = field(default_factory=set)

    def watch(self, id: LayerId) -> None:
        """Watch the helper of a union that was just mounted, if it has one."""
        self.dead.discard(id)
        found = self.backend.helper(self._target(id))
        if found is not None and (id, *found) not in self._watched:
            self._watched.add((id, *found))
            watch = partial(self._watch, id, *found)
            self.nursery.start_soon(self.task.until_done, watch, (id, *found))

    def forget(self, id: LayerId) -> None:
        """The union was unmounted."""
        self.dead.discard(id)

    async def _watch(self, id: LayerId, pid: int, start: int) -> None:
        await ended(pid, start)
        self._watched.discard((id, pid, start))
        entry = self.table.entries.get(id)
        if entry is None or not entry.mounted or entry.state is not State.ACTIVE:
            return
        # it may be mounted again by now, with another helper
        if not self.backend.is_mounted(self._target(id)):
            self.deaths += 1
            self.dead.add(id)
            log.error(
                "the helper of a union has ended; the next get mounts it anew", id=id, pid=pid
            )

    def _target(self, id: LayerId) -> str:
        return self.table.store.layout.mount_point(id)


@dataclass(slots=True)
class ProcessWatch:
    """The processes with references. `put_all` drops all references of one process to a layer."""

    table: Table
    nursery: trio.Nursery
    task: Task
    put_all: Callable[[LayerId, int, int], Awaitable[None]]
    # how many processes have ended
    ends: int = 0
    _watched: set[tuple[int, int]] = field(default_factory=set)

    def watch(self, reference: Reference) -> None:
        """Have this reference put when its process ends."""
        key = (reference.pid, reference.start)
        if key not in self._watched:
            self._watched.add(key)
            self.nursery.start_soon(self._watch, *key)

    async def _watch(self, pid: int, start: int) -> None:
        await self.task.until_done(partial(ended, pid, start), (pid, start))
        self._watched.discard((pid, start))
        self.ends += 1
        for id in self.table.referenced_by(pid, start):
            log.info("process ended, its references are put", id=id, pid=pid)
            await self.task.until_done(partial(self._put, id, pid, start), (id, pid, start))

    async def _put(self, id: LayerId, pid: int, start: int) -> None:
        try:
            await self.put_all(id, pid, start)
        except (AufsdError, OSError) as error:
            # its references are gone all the same; the mount is tried again with the busy ones
            log.warning("put for an ended process failed", id=id, pid=pid, error=str(error))
