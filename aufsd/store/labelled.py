"""Keeps a labelled snapshot of a parent, for the next child with the same label.

A label is an xattr on every inode, so labelling takes long. A clone of a labelled snapshot is one
call. One snapshot is kept for each parent, below the parent's work directory, which is removed with
the layer. Its name is made from the state of the parent and the label, so no other is used.
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

    The place changes with any change of the parent, but not when the parent is cloned
    (btrfs_update_root_times()).
    """
    found = contents.state(store.layout.content(parent))
    name = hashlib.sha256(f"{found.uuid.hex()} {found.changed} {label}".encode()).hexdigest()
    own_directory(store.layout.work(parent))
    kept = f"{store.layout.work(parent)}/{_KEPT}{name}"
    return staging.stage_child(store, parent, size, kept) if os.path.isdir(kept) else "", kept


def keep(store: Store, parent: LayerId, staged: str, kept: str) -> None:
    """Keep a snapshot of the labelled content `staged` at `kept`, and no other one."""
    discard(store, parent)
    own_directory(store.layout.work(parent))
    contents.snapshot(staged, kept)


def discard(store: Store, parent: LayerId) -> None:
    """Discard the kept snapshot of a layer, because the layer may change now."""
    directory = store.layout.work(parent)
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    for name in names:
        if name.startswith(_KEPT):
            removal.discard_staged(store, f"{directory}/{name}")
