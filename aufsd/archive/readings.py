"""Finds the names of a chain that aufs shows in another way than `view`, which is OCI's rule.

aufs (fs/aufs/dentry.c, au_lkup_dentry(), Linux 6.1) differs in four ways. Of several opaque
directories of one name the lowest counts, so files show again if their directory was deleted and
made again twice. A file between two directories is ignored. An opaque mark on a branch's root is
ignored. And a name beside its own whiteout in one branch is hidden.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from aufsd.archive import strays, view
from aufsd.archive.compact import Ordered
from aufsd.archive.meter import shown
from aufsd.archive.requests import Branch
from aufsd.archive.view import Place
from aufsd.results import Problem
from aufsd.store import whiteouts
from aufsd.store.dialect import Dialect
from aufsd.store.walk import Way

PROBLEM: Final = "aufs-reads-differently"
# names in one problem
_NAMED: Final = 5


class _Level(NamedTuple):
    """A directory in both readings: the branches' directories that make it up."""

    way: Way
    strict: list[Place]
    aufs: list[Place]
    names: Iterator[bytes]


def look_into(store: int, chain: Sequence[Branch], namespace: str) -> tuple[Problem, ...]:
    """What `check` with `deep` says of the content of chain[0]. Raises OSError.

    The current directory is another one afterwards.
    """
    found = strays.problems(store, chain, namespace)
    other = problem(chain[0].id, differences(*roots(store, chain, namespace)))
    return (*found, other) if other else tuple(found)


def roots(store: int, chain: Sequence[Branch], namespace: str) -> tuple[list[Place], list[Place]]:
    """The roots of a chain in the strict reading and in aufs's; `store` is where branches lie."""
    if chain[0].dialect is Dialect.NONE:
        # aufs would show all of it, and nothing else
        chain = chain[:1]
    kept = view.keep(2 * len(chain))
    everything = [view.root(store, branch, namespace, kept) for branch in chain]
    return view.roots(store, chain, namespace, beside=len(chain)), everything


def differences(strict: list[Place], aufs: list[Place]) -> Iterator[Way]:
    """The names that one reading shows and the other does not, or as another type.

    Takes what `roots` gave, and closes it. Sorted; nothing is listed below such a name. Raises
    OSError, ESTALE if directories were moved meanwhile.
    """
    try:
        levels = [_level(Way(None, b""), strict, aufs)]
        while levels:
            level = levels[-1]
            depth = len(levels) - 1
            for name in level.names:
                one, other = _by_strict(level.strict, name), _by_aufs(level.aufs, name)
                if one and other:
                    levels.append(_level(Way(level.way, name), one, other))
                    break
                _up(one, other, depth)
                if one != other:
                    yield Way(level.way, name)
            else:
                levels.pop()
                _up(level.strict, level.aufs, max(0, depth - 1))
    finally:
        for place in (*strict, *aufs):
            place.close()


def _up(strict: list[Place] | None, aufs: list[Place] | None, depth: int) -> None:
    if view.ascend((*(strict or ()), *(aufs or ())), depth) < depth:
        raise OSError(errno.ESTALE, "directories were moved while the layer was read")


def problem(id: str, found: Iterable[Way]) -> Problem | None:
    """What `check` says of a layer with these differences; None if there are none."""
    first: list[str] = []
    count = 0
    for way in found:
        count += 1
        if count <= _NAMED:
            first.append("/" + shown(way.path()))
    if not count:
        return None
    names = "1 name" if count == 1 else f"{count} names"
    more = f" and {count - _NAMED} more" if count > _NAMED else ""
    detail = f"aufs shows {names} otherwise than all else does: {', '.join(first)}{more}"
    return Problem(id, PROBLEM, detail, False)


# --- what a reading has under a name: None, a directory's places, or no place for all else ----


def _by_strict(merged: Sequence[Place], name: bytes) -> list[Place] | None:
    found = view.lookup(merged, name)
    return None if found is None else view.descend(merged, name, found)


def _by_aufs(merged: Sequence[Place], name: bytes) -> list[Place] | None:
    depth = merged[0].depth
    found: list[Place] = []
    end = 0
    for place in merged:
        if place.layer.marks.hides(place.fd, name):
            break
        try:
            status = os.stat(name, dir_fd=place.fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        if place.layer.marks.is_whiteout(name, status, place.fd):
            break
        if stat.S_ISDIR(status.st_mode):
            place.down(name)
            found.append(place)
            if place.layer.marks.is_opaque(place.fd):
                end = len(found)
        elif not found:
            return []
    if end:
        view.ascend(found[end:], depth)
        del found[end:]
    return found or None


def _level(way: Way, strict: list[Place], aufs: list[Place]) -> _Level:
    return _Level(way, strict, aufs, _doubtful(strict, aufs))


def _doubtful(strict: list[Place], aufs: list[Place]) -> Iterator[bytes]:
    """The names of a directory that may be read in two ways, or something below them."""
    by_id = {place.layer.id: place for place in (*strict, *aufs)}
    common = {place.layer.id for place in strict} & {place.layer.id for place in aufs}
    # a name is in doubt if several of the branches have a directory of it, if it is in one that
    # only one reading has at all, or if it stands beside its own whiteout: it comes twice then
    found = Ordered()
    for id, place in by_id.items():
        os.fchdir(place.fd)
        with os.scandir(b".") as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(whiteouts.META):
                    continue
                hidden = whiteouts.deleted_name(name) if place.layer.marks.aufs else None
                if id not in common or (hidden is not None and os.path.lexists(hidden)):
                    found.add(hidden or name)
                    found.add(hidden or name)
                elif entry.is_dir(follow_symlinks=False):
                    found.add(name)
    return (name for name, rows in groupby(found) if sum(1 for _ in rows) > 1)
