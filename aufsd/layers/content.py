"""The two kinds of layer content: a directory of changes, or a snapshot with everything in it.

The backend decides which kind a store has (`Backend.snapshots`), when the daemon starts.
`directories.py` and `snapshots.py` implement the two, and only they differ by kind.
"""

from typing import Protocol

from aufsd import results
from aufsd.results import Problem
from aufsd.store.ids import LayerId


class Content(Protocol):
    """The steps in which the two kinds differ. The caller has claimed the layers."""

    async def create(
        self, id: LayerId, parents: tuple[LayerId, ...], *, label: str, size: int
    ) -> list[str]:
        """Make an empty layer. Returns warnings. All or nothing, also when cancelled.

        `size`: the most bytes that it may have; 0 for no limit.
        """

    async def apply(self, id: LayerId, source: int, *, digest: bool) -> results.Streamed:
        """Unpack a tar into a layer. All or nothing, also when cancelled."""

    def needs_mount(self, chain: tuple[LayerId, ...], *, read_only: bool) -> bool:
        """Whether `get` mounts the first of the chain, or gives out its content directory."""

    async def before_giving_out(self, id: LayerId, *, read_only: bool) -> None:
        """Prepare a layer for a caller, who may write into it unless `read_only`.

        Raises MountFailed or OSError; then the layer must not be given out.
        """

    def compared_with(self, chain: tuple[LayerId, ...]) -> tuple[LayerId, ...]:
        """The chain to compare the first layer's content with, to find what the layer changed.

        Empty if the content is the change itself.
        """

    async def check_content(self, ids: list[LayerId]) -> list[Problem]:
        """The part of a deep `check` that reads the content of layers."""
