"""A squash on disk: one content takes the place of several layers', and those between go.

The content is exchanged by the steps of replacing.py, on btrfs only the parents file is. Before
that the layers that are to go are listed in staging (`squash-gone:ID`): a start that finds the list
removes those that the layer does not stand on any more. Synchronous; the caller holds the
transitions of all ids.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

from aufsd.store import removal, subvolumes
from aufsd.store.content import fsync
from aufsd.store.dialect import Dialect
from aufsd.store.format import write_durably
from aufsd.store.ids import LayerId, is_id
from aufsd.store.index import parent_mark
from aufsd.store.layers import Store
from aufsd.store.origin import read_origin
from aufsd.store.replacing import Move, commit, discard_old, prepare_staged

_GONE: Final = "squash-gone:"


def squash_directory(
    store: Store, id: LayerId, parents: Sequence[LayerId], staged: str, gone: Sequence[LayerId]
) -> None:
    """Put the merged content `staged` in the layer's place, on these parents; all or nothing.

    `gone` stay until `forget_gone`, or until a start removes them. OSError: nothing was done, and
    `staged` is gone.
    """
    move = Move(store.layout, "squash", id)
    try:
        _note_gone(store, id, gone)
        os.rename(staged, move.fresh)
        marks = parent_mark(parents[0] if parents else None, store.xattr_namespace)
        for name, value in marks.items():
            os.setxattr(move.fresh, name, value)
        ready = prepare_staged(store, move, parents)
    except BaseException:
        for path in (staged, move.fresh, move.marker):
            removal.discard_staged(store, path)
        forget_gone(store, id)
        raise
    try:
        commit(ready)
    except BaseException:
        forget_gone(store, id)
        raise
    finally:
        ready.close()
    discard_old(store, id)


def squash_subvolume(
    store: Store,
    id: LayerId,
    parents: Sequence[LayerId],
    lowest: LayerId,
    gone: Sequence[LayerId],
) -> None:
    """Have a subvolume, which holds all that shows anyway, stand on these parents; all or nothing.

    `lowest` is the layer between that was made on the first of the parents. As `squash_directory`.
    """
    layout = store.layout
    file, fresh = layout.parents_file(id), f"{layout.staging}/parents-{id}"
    try:
        _note_gone(store, id, gone)
        text = "".join(f"{parent}\n" for parent in parents)
        write_durably(fresh, text, store.sync, like=os.lstat(file))
        os.rename(fresh, file)
    except BaseException:
        removal.discard_staged(store, fresh)
        forget_gone(store, id)
        raise
    parent = parents[0] if parents else None
    # of what a start would make good, or which is only for speed
    with suppress(OSError):
        _mark(store, id, parent, lowest)
        if store.sync != "none":
            fsync(layout.layers)


def _mark(store: Store, id: LayerId, parent: LayerId | None, lowest: LayerId | None) -> None:
    layout, namespace = store.layout, store.xattr_namespace
    # what it has in common with its new parent is what the lowest had
    origin = read_origin(layout.content(lowest), namespace) if parent and lowest else None
    subvolumes.mark(layout.content(id), parent_mark(parent, namespace), origin, namespace)


def _note_gone(store: Store, id: LayerId, gone: Sequence[LayerId]) -> None:
    write_durably(_list(store, id), "".join(f"{each}\n" for each in gone), store.sync)
    if store.sync != "none":
        fsync(store.layout.staging)


def forget_gone(store: Store, id: LayerId) -> None:
    """They are gone, or nothing was done."""
    removal.discard_staged(store, _list(store, id))


def _list(store: Store, id: LayerId) -> str:
    return f"{store.layout.staging}/{_GONE}{id}"


def finish_squashes(store: Store) -> Iterator[LayerId]:
    """Remove the layers that squashes which were cut off had still to remove; which."""
    for name in sorted(os.listdir(store.layout.staging)):
        id = LayerId(name.removeprefix(_GONE))
        if not name.startswith(_GONE) or not is_id(id):
            continue
        if id in store.parent:
            with open(f"{store.layout.staging}/{name}") as file:
                gone = [LayerId(line) for line in file.read().split("\n") if is_id(line)]
            yield from _remove(store, id, gone)
        os.unlink(f"{store.layout.staging}/{name}")


def _remove(store: Store, id: LayerId, gone: Sequence[LayerId]) -> Iterator[LayerId]:
    chain = store.chain(id)
    if not gone or gone[0] in chain:
        return
    if store.dialect(id) is Dialect.NONE:
        _mark(store, id, store.parent[id], None)
    for each in gone:
        if each in store.parent and not store.children_of(each):
            for error in removal.remove_on_disk(store, each):
                raise error
            store.forget(each)
            yield each
