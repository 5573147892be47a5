"""Records from which state of its parent a snapshot was made.

This is an xattr of the layer's top directory. With it, btrfs's transaction numbers say which inodes
have changed since, and the two trees need not be compared as a whole.
"""

import os
import re
from typing import Final, NamedTuple

from aufsd.digits import number
from aufsd.store.dialect import Where

_NAME: Final = "aufsd.origin"
_UUID: Final = re.compile("[0-9a-f]{32}")
# the largest transaction number that one can be added to
_LAST: Final = (1 << 63) - 1


class Origin(NamedTuple):
    """The parent's subvolume, and the transactions after which a change of each makes them differ.

    `parted` is the transaction that made the snapshot, for the parent. `generation` is for the
    layer: the transaction of its label, which is no change of its content.
    """

    uuid: bytes
    parted: int
    generation: int


def write_origin(where: Where, origin: Origin, namespace: str) -> None:
    """Record it on a layer. Raises OSError."""
    value = f"{origin.uuid.hex()} {origin.parted} {origin.generation}".encode()
    os.setxattr(where, f"{namespace}.{_NAME}", value)


def read_origin(where: Where, namespace: str) -> Origin | None:
    """The origin of a layer; None if none is recorded, or it cannot be parsed."""
    try:
        uuid, parted, generation = os.getxattr(where, f"{namespace}.{_NAME}").decode().split(" ")
    except (OSError, ValueError):
        return None
    numbers = number(parted, _LAST), number(generation, _LAST)
    if not _UUID.fullmatch(uuid) or numbers[0] is None or numbers[1] is None:
        return None
    return Origin(bytes.fromhex(uuid), numbers[0], numbers[1])
