"""Removes a layer from disk, and moves away what is to be deleted later. Synchronous.

The commit point of a removal is the rename of the parents file into `.aufsd/removing`. Content goes
there too, and `erase_removed` deletes it in the background.
"""

import contextlib
import os

from aufsd.kernel.beneath import DIRECTORY
from aufsd.store import content as contents
from aufsd.store.content import fsync
from aufsd.store.erase import Left, erase
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store


def remove_on_disk(store: Store, id: LayerId) -> list[OSError]:
    """Move the parents file to `.aufsd/removing`, which is the commit, and then the rest.

    While the parents file is there, recovery knows that the rest of the layer is to be removed, and
    is not content that somebody else put into the store. Raises OSError if the commit failed; then
    nothing was done. Returns the errors of what could not be moved after the commit;
    `finish_removal` or recovery moves it later.
    """
    store.identity.verify()
    layout = store.layout
    record, name = layout.removal(id), layout.parents_file(id)
    try:
        os.rename(name, record)
    except FileNotFoundError:
        # somebody else has deleted it; remove content and mount point all the same
        with open(record, "wb"):
            pass
    else:
        if store.sync != "none":
            try:
                fsync(layout.layers)
            except OSError:
                os.rename(record, name)
                raise
    return finish_removal(store, id)


def finish_removal(store: Store, id: LayerId) -> list[OSError]:
    """Move the rest of a layer whose removal was committed. Returns the failures."""
    failures: list[OSError] = []
    layout = store.layout
    with contextlib.suppress(OSError):
        contents.thaw(layout.content(id))
    for path in (layout.content(id), layout.mount_point(id), layout.work(id)):
        try:
            discard(store, path)
        except OSError as error:
            failures.append(error)
    if not failures:
        try:
            os.unlink(layout.removal(id))
        except FileNotFoundError:
            pass  # the removal was finished already
        except OSError as error:
            failures.append(error)
    return failures


def half_removed(store: Store) -> list[LayerId]:
    """Layers whose removal was committed, and not finished."""
    return store.layout.marked(os.listdir(store.layout.removing))


def discard(store: Store, path: str) -> None:
    """Move a directory to `removing`, where it is deleted later. Harmless if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, _removing_name(store, os.path.basename(path)))


def discard_staged(store: Store, path: str) -> None:
    """The same for a staging. If it cannot be moved, `erase_removed` tries again."""
    try:
        discard(store, path)
    except OSError:
        store.undiscarded.append(path)


def _removing_name(store: Store, name: str) -> str:
    return f"{store.layout.removing}/{os.getpid()}.{next(store.serial)}.{name[:200]}"


def erase_removed(store: Store) -> dict[str, Left]:
    """Delete what is in `removing`. Returns what could not be deleted, by its name there."""
    left, store.undiscarded = store.undiscarded, []
    for path in left:
        discard_staged(store, path)
    directory = store.layout.removing
    found: dict[str, Left] = {}
    try:
        removing = os.open(directory, DIRECTORY)
    except OSError as error:
        return {"": Left.of(error, directory)}
    try:
        for name in sorted(_removed(store, removing)):
            one = erase(removing, os.fsencode(name), f"{directory}/{name}")
            if one is not None:
                found[name] = one
    except OSError as error:
        found[""] = Left.of(error, directory)
    finally:
        os.close(removing)
    return found


def _removed(store: Store, removing: int) -> set[str]:
    """The names to delete: all but the parents files of unfinished removals."""
    names = os.listdir(removing)
    half = {os.path.basename(store.layout.removal(id)) for id in store.layout.marked(names)}
    return set(names) - half
