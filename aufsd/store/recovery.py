"""Finishes or undoes, at start, what a crash has interrupted, and reports each step.

Each operation has one commit point (docs/architecture.md), so the files on disk show whether the
crash was before or after it. Nothing is deleted here. Files are moved to `.aufsd/removing`, and
deleted there after the daemon is ready. Only files that aufsd or Docker's driver left are moved;
`check` reports all others. An interrupted conversion is finished after the daemon is ready, or by
the first mount that needs the layer.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from aufsd.kernel import mountinfo, syscalls
from aufsd.store import removal
from aufsd.store.ids import LayerId, is_id
from aufsd.store.layers import Store
from aufsd.store.layout import TRIAL_LEFT
from aufsd.store.squashing import finish_squashes

Action = Literal["finished", "undone", "failed"]
ACTIONS: tuple[Action, ...] = get_args(Action)


@dataclass(frozen=True, slots=True)
class Recovered:
    """One step of recovery. `failed`: it was not done, and `what` says why."""

    action: Action
    what: str
    name: str


def recover(store: Store) -> list[Recovered]:
    """Finish or undo what was interrupted. The steps, in order. It may be interrupted itself.

    What fails is reported, and left for the next start.
    """
    steps: tuple[Callable[[Store], Iterator[Recovered]], ...] = (
        _trials,
        _replacements,
        _squashes,
        _staged,
        _removals,
        _removals_by_docker,
        _creations,
        _work,
    )
    done: list[Recovered] = []
    for step in steps:
        try:
            done += step(store)
        except OSError as error:
            reason = f"{step.__name__.strip('_')}: {error.strerror}"
            done.append(Recovered("failed", reason, error.filename or ""))
    return done


def _trials(store: Store) -> Iterator[Recovered]:
    """Trial mounts that a killed daemon left."""
    probes = store.layout.probes
    names = sorted(os.listdir(probes))
    if not names:
        return
    for row in reversed(mountinfo.mounted_under(probes)):
        syscalls.umount2(row.mount_point, syscalls.UMOUNT_NOFOLLOW)
    for name in names:
        removal.discard(store, f"{probes}/{name}")
        yield Recovered("undone", "trial mount", name)


def discard_trials(store: Store) -> None:
    """Discard the files that trial mounts could not delete. Raises OSError."""
    probes = store.layout.probes
    for name in os.listdir(probes):
        if name.startswith(TRIAL_LEFT):
            removal.discard(store, f"{probes}/{name}")


def _replacements(store: Store) -> Iterator[Recovered]:
    """Report replacements, which were recovered before the index was read (replacing.py)."""
    for action, what, name in store.resumed:
        yield Recovered(next(each for each in ACTIONS if each == action), what, name)


def _squashes(store: Store) -> Iterator[Recovered]:
    """Squashes after their commit: the layers in between are still to be removed."""
    for id in finish_squashes(store):
        yield Recovered("finished", "squash", id)


def _staged(store: Store) -> Iterator[Recovered]:
    """Before their commit: staged content, and parents files that were being repaired."""
    for name in sorted(os.listdir(store.layout.staging)):
        # the parents file of an unfinished create stays until `_creations` has removed its
        # directories
        if store.layout.marked((name,)):
            continue
        removal.discard(store, f"{store.layout.staging}/{name}")
        if not name.startswith("parents-"):
            yield Recovered("undone", "apply_diff", name)


def _removals(store: Store) -> Iterator[Recovered]:
    """Removals after their commit: the parents file is in `removing` already."""
    for id in removal.half_removed(store):
        if store.exists(id):
            # the id was made again since, and the file of the old removal is left
            os.unlink(store.layout.removal(id))
            continue
        for error in removal.finish_removal(store, id):
            raise error
        yield Recovered("finished", "remove", id)


def _removals_by_docker(store: Store) -> Iterator[Recovered]:
    """Docker's driver renames, then deletes; moby 276b44608b cleans the same at start."""
    for directory in (store.layout.diff, store.layout.mnt):
        for name in sorted(os.listdir(directory)):
            if name.endswith("-removing") and is_id(name.removesuffix("-removing")):
                removal.discard(store, f"{directory}/{name}")
                yield Recovered("finished", "remove by Docker", name)


def _creations(store: Store) -> Iterator[Recovered]:
    """Directories without a parents file that are empty, or of an unfinished create."""
    coming = store.layout.marked(os.listdir(store.layout.staging))
    found: set[str] = set()
    for directory in (store.layout.mnt, store.layout.diff):
        for name in os.listdir(directory):
            if is_id(name) and not store.exists(LayerId(name)):
                path = f"{directory}/{name}"
                try:
                    # rmdir(2) refuses directories that are not empty, and mount points
                    os.rmdir(path)
                except OSError:
                    if name not in coming or directory == store.layout.mnt:
                        continue
                    removal.discard(store, path)
                found.add(name)
    for id in coming:
        os.unlink(store.layout.creation(id))
    for name in sorted(found):
        yield Recovered("undone", "create", name)


def _work(store: Store) -> Iterator[Recovered]:
    """Work directories of layers that are gone."""
    directory = os.path.dirname(store.layout.work(LayerId("any")))
    for name in sorted(os.listdir(directory)):
        if not (is_id(name) and store.exists(LayerId(name))):
            removal.discard(store, f"{directory}/{name}")
            yield Recovered("finished", "remove", f"work directory of {name}")
