"""One tick of the reader: the calls that it begins one after the other, without an await.

All calls of a tick had arrived before the first of them began. So the kernel is asked about a mount
once, and every call of the tick relies on the answer. What the calls change in the table goes into
the journal in one write at the end, before any of them is answered (databases call it group
commit).
"""

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field

from aufsd.active.journal import Journal
from aufsd.active.refs import Entry
from aufsd.store.ids import LayerId


@dataclass(slots=True)
class Tick:
    """The context manager around a tick. One object serves all ticks."""

    journal: Journal
    entries: Mapping[LayerId, Entry]
    # layers whose mounts were found in place during this tick
    verified: set[LayerId] = field(default_factory=set)

    @property
    def is_open(self) -> bool:
        """Whether a tick is under way."""
        return self.journal.buffering

    @property
    def buffered(self) -> Sized:
        """The journal's lines that this tick has not written yet; always the same object."""
        return self.journal.buffered

    def __enter__(self) -> None:
        self.journal.start_buffering()

    def __exit__(self, *_: object) -> None:
        self.verified.clear()
        self.journal.write_buffered(self.entries)
