"""What a crash left in a store: finished or undone at start, and said.

Each operation has one commit point (layers.py), so what lies on disk says on which side of it the
crash was. Nothing is deleted here, only moved to `.aufsd/removing`, whose content goes after the
daemon is ready; and nothing that aufsd or Docker's driver did not leave behind is moved at all:
`check` reports that.
"""

import os
from dataclasses import dataclass

from aufsd.store.ids import LayerId, is_id
from aufsd.store.layers import CREATING_XATTR, REMOVING_XATTR, Store


@dataclass(frozen=True, slots=True)
class Recovered:
    """One thing that recovery did. `action` is `finished` or `undone`."""

    action: str
    what: str
    name: str


def recover(store: Store) -> list[Recovered]:
    """Finish or undo what was cut off; what was done, in order. Safe to be cut off itself."""
    done: list[Recovered] = []
    for name in sorted(os.listdir(store.layout.staging)):
        store.discard(f"{store.layout.staging}/{name}")
        what = "create" if name.startswith("parents-") else "apply_diff"
        done.append(Recovered("undone", what, name))
    for directory in (store.layout.diff, store.layout.mnt):
        for name in sorted(os.listdir(directory)):
            path = f"{directory}/{name}"
            if name.endswith("-removing") and is_id(name.removesuffix("-removing")):
                # Docker's driver renames, then deletes; moby 276b44608b cleans the same at start
                store.discard(path)
                done.append(Recovered("finished", "remove by Docker", name))
            elif is_id(name) and not store.exists(LayerId(name)):
                done += _orphan(store, path, name)
    return done


def _orphan(store: Store, path: str, name: str) -> list[Recovered]:
    """A directory without a parents file: ours to finish, ours to undo, or somebody's."""
    if _is_marked(store, path, REMOVING_XATTR):
        store.discard(path)
        return [Recovered("finished", "remove", name)]
    if _is_marked(store, path, CREATING_XATTR):
        store.discard(path)
        return [Recovered("undone", "create", name)]
    try:
        # create makes empty directories before the parents file; rmdir(2) refuses any other, and
        # a mount point
        os.rmdir(path)
    except OSError:
        return []
    return [Recovered("undone", "create", name)]


def _is_marked(store: Store, path: str, mark: str) -> bool:
    try:
        os.getxattr(path, f"{store.xattr_namespace}.{mark}", follow_symlinks=False)
    except OSError:
        return False
    return True
