"""Notices at once when a process that serves a union ends while the union is in use.

The next `get` mounts such a union again, with its references; until then `health` names it.
"""

from dataclasses import dataclass, field

import structlog
import trio

from aufsd.processes import ended
from aufsd.refs import State
from aufsd.store.ids import LayerId
from aufsd.table import Table
from aufsd.union.backend import Backend

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class HelperWatch:
    """The helpers of one store's unions. `dead` are ids whose helper ended while it was mounted."""

    backend: Backend
    table: Table
    nursery: trio.Nursery
    dead: set[LayerId] = field(default_factory=set)
    deaths: int = 0
    _watched: set[tuple[LayerId, int, int]] = field(default_factory=set)

    def mounted(self, id: LayerId) -> None:
        """A union is mounted: look after its helper, if it has one."""
        self.dead.discard(id)
        found = self.backend.helper(self._target(id))
        if found is not None and (id, *found) not in self._watched:
            self._watched.add((id, *found))
            self.nursery.start_soon(self._watch, id, *found)

    def unmounted(self, id: LayerId) -> None:
        """It is not any more."""
        self.dead.discard(id)

    async def _watch(self, id: LayerId, pid: int, start: int) -> None:
        await ended(pid, start)
        self._watched.discard((id, pid, start))
        entry = self.table.entries.get(id)
        if entry is None or not entry.union or entry.state is not State.MOUNTED:
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
