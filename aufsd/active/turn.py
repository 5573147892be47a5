"""What calls share that had all arrived before the first of them began, and that never wait.

The loop takes such calls in turns, with no await in one. Each may count on what the kernel said
after it arrived, so the kernel is asked about a mount once for all of them; and what they change in
the table is written to the journal in one piece, before any of them is answered.
"""

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field

from aufsd.active.journal import Journal
from aufsd.active.refs import Entry
from aufsd.store.ids import LayerId


@dataclass(slots=True)
class Turn:
    """A turn lasts as long as the block that this is the context manager of."""

    journal: Journal
    entries: Mapping[LayerId, Entry]
    # layers whose mounts were seen to stand in this turn; empty between two
    standing: set[LayerId] = field(default_factory=set)

    @property
    def taken(self) -> bool:
        """Whether there is a turn now."""
        return self.journal.holding

    @property
    def unwritten(self) -> Sized:
        """What the journal lacks of what calls have changed in this turn; always one object."""
        return self.journal.unwritten

    def __enter__(self) -> None:
        self.journal.hold()

    def __exit__(self, *_: object) -> None:
        self.standing.clear()
        self.journal.release(self.entries)
