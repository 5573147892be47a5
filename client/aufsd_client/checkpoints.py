"""Names for checkpoints, and the rows of a layer's log. Pure; standard library only."""

from collections.abc import Iterable
from dataclasses import dataclass

from aufsd_client import results

# of a layer id; two digits less for each factor of a hundred
_LONGEST = 200
_ROOM = 12
# how often another name is tried, if somebody else takes the one that was free
TRIES = 10


@dataclass(frozen=True, slots=True)
class LogRow:
    """One layer of a chain in `log`: when it was made, and how large its own content is."""

    id: str
    created: float
    sealed: bool
    references: int
    size: int
    inodes: int


def stem(id: str) -> str:
    """With what the names of a layer's checkpoints begin: `work.` of `work.1`, `work.2`."""
    return f"{id[: _LONGEST - _ROOM]}."


def next_name(id: str, taken: Iterable[str]) -> str:
    """The name of a layer's next checkpoint; `taken` are the layers that begin with its stem."""
    begin = stem(id)
    rests = (other.removeprefix(begin) for other in taken)
    numbers = [int(rest) for rest in rests if rest.isascii() and rest.isdecimal()]
    return f"{begin}{max(numbers, default=0) + 1}"


def row(id: str, metadata: dict[str, str], used: results.Usage) -> LogRow:
    """A row of the log, from what `get_metadata` and `usage` say of a layer."""
    return LogRow(
        id,
        float(metadata["created"]),
        metadata["sealed"] == "true",
        int(metadata["references"]),
        used.size,
        used.inodes,
    )


def chain(id: str, metadata: dict[str, str]) -> list[str]:
    """A layer and what it stands on, nearest first."""
    return [id, *metadata["parents"].split()]
