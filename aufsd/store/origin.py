"""What a layer that is a snapshot began as: which parent, in which transactions of the file system.

An xattr of the layer's top directory. With it, what the layer changed can be read from the file
system's own books instead of by comparing two whole trees.
"""

import os
import re
from typing import Final, NamedTuple

from aufsd.digits import number
from aufsd.store.dialect import Where

_NAME: Final = "aufsd.origin"
_UUID: Final = re.compile("[0-9a-f]{32}")
# transactions are numbered so far, and one may be added
_LAST: Final = (1 << 63) - 1


class Origin(NamedTuple):
    """The parent's subvolume, and after which transaction a change of each makes them differ.

    `parted` is for the parent, the one that made the snapshot; `generation` is for the layer, once
    all was done to it that is no change of its content (its label).
    """

    uuid: bytes
    parted: int
    generation: int


def write_origin(where: Where, origin: Origin, namespace: str) -> None:
    """Note it on a layer. Raises OSError."""
    value = f"{origin.uuid.hex()} {origin.parted} {origin.generation}".encode()
    os.setxattr(where, f"{namespace}.{_NAME}", value)


def read_origin(where: Where, namespace: str) -> Origin | None:
    """What a layer began as; None if nothing is noted, or nothing that can be read."""
    try:
        uuid, parted, generation = os.getxattr(where, f"{namespace}.{_NAME}").decode().split(" ")
    except (OSError, ValueError):
        return None
    numbers = number(parted, _LAST), number(generation, _LAST)
    if not _UUID.fullmatch(uuid) or numbers[0] is None or numbers[1] is None:
        return None
    return Origin(bytes.fromhex(uuid), numbers[0], numbers[1])
