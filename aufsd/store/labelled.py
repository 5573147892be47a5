"""What a parent holds with a label on all of it, kept for the next child that asks for that label.

A label is an xattr on every inode; a snapshot of what has it already is one call, whatever that
holds. One is kept for each parent, below its work directory, which goes with the layer. Its name
says of which state of the parent and with which label it was made: it is never taken for another.
"""

import hashlib
import os

from aufsd.store import content as contents
from aufsd.store import removal, staging
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.store.opened import own_directory

_KEPT = "labelled-"


def stage(store: Store, parent: LayerId, label: str, size: int) -> tuple[str, str]:
    """As staging.stage_child, from the snapshot kept with this label, "" if there is none. And its
    place.

    A change of any inode of the parent makes it another place, a snapshot of the parent does not
    (btrfs_update_root_times()).
    """
    found = contents.state(store.layout.content(parent))
    name = hashlib.sha256(f"{found.uuid.hex()} {found.changed} {label}".encode()).hexdigest()
    own_directory(store.layout.work(parent))
    kept = f"{store.layout.work(parent)}/{_KEPT}{name}"
    return staging.stage_child(store, parent, size, kept) if os.path.isdir(kept) else "", kept


def keep(store: Store, parent: LayerId, staged: str, kept: str) -> None:
    """Keep a copy of the labelled content `staged` at the place `kept`, and nothing else."""
    discard(store, parent)
    own_directory(store.layout.work(parent))
    contents.snapshot(staged, kept)


def discard(store: Store, parent: LayerId) -> None:
    """Let go of what is kept of a layer, to be deleted later: it may change now."""
    directory = store.layout.work(parent)
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    for name in names:
        if name.startswith(_KEPT):
            removal.discard_staged(store, f"{directory}/{name}")
