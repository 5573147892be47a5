"""What a layer's content is: a directory with its own changes, or a whole snapshot.

The backend decides which (`Backend.snapshots`), once, when the daemon starts. `directories.py` and
`snapshots.py` are the two; nothing else asks which of them a store has.
"""

from typing import Protocol

from aufsd import results
from aufsd.results import Problem
from aufsd.store.ids import LayerId


class Content(Protocol):
    """The steps in which the two differ. The caller has claimed the layers that it names."""

    async def create(
        self, id: LayerId, parents: tuple[LayerId, ...], *, label: str, size: int
    ) -> list[str]:
        """Make an empty layer; warnings. All or nothing. Cancelled: nothing was made.

        `size`: at most so many bytes, 0 for no limit.
        """

    async def apply(self, id: LayerId, source: int, *, digest: bool) -> results.Streamed:
        """Unpack a tar into a layer. All or nothing; cancelled: the layer is as it was."""

    def needs_mount(self, chain: tuple[LayerId, ...], *, read_only: bool) -> bool:
        """Whether `get` mounts the first of the chain; if not, it gives its content directory."""

    async def prepare_to_give(self, id: LayerId, *, read_only: bool) -> None:
        """Called before a layer is given to a caller, who may write into it unless `read_only`.

        Raises MountFailed or OSError; then the layer must not be given out.
        """

    def compared_with(self, chain: tuple[LayerId, ...]) -> tuple[LayerId, ...]:
        """The chain that the first layer's content is compared with to tell what it changed.

        Empty if its content is the change already.
        """

    async def check_content(self, ids: list[LayerId]) -> list[Problem]:
        """The part of a deep check that reads the content of layers."""
