"""Checks the consistency of layers/, diff/ and mnt/, and repairs what can be repaired.

A repair moves files into quarantine, makes missing directories, and writes a lost parents file from
the mark on the content. It deletes nothing. What the kernel refuses, such as to move a busy mount,
is left as it is. Synchronous; for a store that is served, and for one that is not.
"""

import errno
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import ParamSpec

from msgspec.structs import replace

from aufsd.kernel import mountinfo
from aufsd.results import Problem
from aufsd.store.content import fsync
from aufsd.store.format import write_durably
from aufsd.store.ids import LayerId, is_id
from aufsd.store.index import read_parent_mark, read_parents
from aufsd.store.layers import Store
from aufsd.store.opened import converting_to
from aufsd_client.errors import LayerDamaged, LayerNotFound

P = ParamSpec("P")

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def check(
    store: Store,
    *,
    id: LayerId | None,
    repair: bool,
    mounted: Collection[LayerId] | None,
) -> list[Problem]:
    """Check one layer, or all layers and what belongs to none.

    `mounted` has the ids of the table; None if no daemon serves the store. The content of layers is
    checked elsewhere (archive/strays.py, archive/fingerprint.py).
    """
    if id is not None:
        store.require(id)
        return _of_one(store, id, repair=repair)
    found = list(whole(store, repair=repair))
    for known in sorted((*store.parent, *store.damaged)):
        found += _of_one(store, known, repair=repair)
    names = {*os.listdir(store.layout.diff), *os.listdir(store.layout.mnt)}
    for name in sorted(names):
        found += _orphan(store, name, repair=repair)
    if mounted is not None:
        found += _uncounted(store, mounted)
    return found


def readable(problem: Problem) -> Problem:
    """The problem, with characters escaped that JSON or a terminal cannot take."""
    return replace(problem, id=_escaped(problem.id), detail=_escaped(problem.detail))


def _escaped(text: str) -> str:
    whole = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in whole)


def again(store: Store, name: str, *, repair: bool, mounted: Collection[LayerId]) -> list[Problem]:
    """Check one name again, while nobody changes it."""
    if is_id(name) and store.exists(LayerId(name)):
        found = _of_one(store, LayerId(name), repair=repair)
        return [*found, *(each for each in _uncounted(store, mounted) if each.id == name)]
    return list(_orphan(store, name, repair=repair))


def whole(store: Store, *, repair: bool) -> Iterator[Problem]:
    """Problems of the store's own directories."""
    yield from _modes(store, repair=repair)
    yield from _strays(store, repair=repair)


def _modes(store: Store, *, repair: bool) -> Iterator[Problem]:
    layout = store.layout
    for path in (layout.root, layout.layers, layout.diff, layout.mnt):
        found = os.lstat(path)
        if stat.S_IMODE(found.st_mode) != 0o710 or (found.st_uid, found.st_gid) != (0, store.gid):
            done = repair and _done(_set_mode, path, store.gid)
            detail = f"{path} is {stat.filemode(found.st_mode)} {found.st_uid}:{found.st_gid}"
            yield Problem("", "wrong-mode", f"{detail}, should be 0710 0:{store.gid}", done)


def _of_one(store: Store, id: LayerId, *, repair: bool) -> list[Problem]:
    """Problems of one layer. If it is removed meanwhile, or cannot be read, the check goes on."""
    try:
        return list(_layer(store, id, repair=repair))
    except LayerNotFound:
        return [Problem(id, "unreadable", "it was removed while it was looked at", False)]
    except OSError as error:
        return [Problem(id, "unreadable", f"{error.filename or id}: {error.strerror}", False)]


def _layer(store: Store, id: LayerId, *, repair: bool) -> Iterator[Problem]:
    if id in store.damaged:
        done = repair and _done(_restore_parents, store, id)
        after = "; its parents file is written again, and counts at the next start" if done else ""
        yield Problem(id, "damaged", store.damaged[id] + after, done)
    elif told := _differing(store, id):
        done = repair and _done(_write_parents, store, id, store.chain(id)[1:])
        yield Problem(id, "parents-differ", told, done)
    content = store.layout.content(id)
    if not os.path.isdir(content) or os.path.islink(content):
        yield Problem(id, "missing-content", f"{content} is not a directory", False)
        return
    mount_point = store.layout.mount_point(id)
    if not os.path.isdir(mount_point) or os.path.islink(mount_point):
        done = repair and _done(os.mkdir, mount_point, 0o755)
        yield Problem(id, "missing-mount-point", f"{mount_point} is not a directory", done)
    half = None
    try:
        half = converting_to(store.identity, id, store.xattr_namespace)
        store.dialect(id)
    except LayerDamaged as error:
        yield Problem(id, "damaged", str(error.data["problem"]), False)
    if half is not None:
        detail = f"a conversion to {half} was cut off; the next mount or convert finishes it"
        yield Problem(id, "half-converted", detail, False)


def _differing(store: Store, id: LayerId) -> str:
    """How a parents file differs from what it was when the store was opened; "" if it does not."""
    path = store.layout.parents_file(id)
    try:
        parents = read_parents(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    if isinstance(parents, str):
        return f"{path}: {parents}"
    if parents != store.chain(id)[1:]:
        return f"{path} names other parents than when the store was opened"
    made_on = read_parent_mark(store.layout.content(id), store.xattr_namespace)
    if made_on is not None and made_on != store.parent[id]:
        return f"{path} does not name {made_on}, which the layer was made on"
    return ""


def _restore_parents(store: Store, id: LayerId) -> None:
    """Write the parents file of a damaged layer again, from the mark on its content."""
    parent = read_parent_mark(store.layout.content(id), store.xattr_namespace)
    if parent is None or parent not in store.parent:
        raise OSError(errno.ENODATA, "nothing says what it was made on")
    _write_parents(store, id, store.chain(parent))


def _write_parents(store: Store, id: LayerId, parents: Sequence[LayerId]) -> None:
    fresh = f"{store.layout.staging}/parents-{id}"
    path = store.layout.parents_file(id)
    # the mode and time of the file say whether the layer is sealed, and when it was made
    like = os.lstat(path) if os.path.isfile(path) and not os.path.islink(path) else None
    write_durably(fresh, "".join(f"{parent}\n" for parent in parents), store.sync, like=like)
    with suppress(FileNotFoundError):
        os.link(path, f"{store.layout.quarantine}/{time.time_ns()}.parents.{id}")
    os.rename(fresh, path)
    if store.sync != "none":
        fsync(store.layout.layers)


def _strays(store: Store, *, repair: bool) -> Iterator[Problem]:
    """Names in layers/ that are no parents files."""
    with os.scandir(store.layout.layers) as entries:
        found = sorted((entry.name, entry.is_file(follow_symlinks=False)) for entry in entries)
    for name, regular in found:
        if not (is_id(name) and regular):
            path = f"{store.layout.layers}/{name}"
            done = repair and _quarantined(store, path, "stray-record")
            yield Problem(name, "stray-record", f"{path} is no parents file", done)


def _orphan(store: Store, name: str, *, repair: bool) -> Iterator[Problem]:
    """A directory that belongs to no layer."""
    if is_id(name) and store.exists(LayerId(name)):
        return
    layout = store.layout
    for directory, problem in ((layout.diff, "orphan-content"), (layout.mnt, "orphan-mount-point")):
        path = f"{directory}/{name}"
        try:
            mounted = mountinfo.is_mount_point(path)
        except FileNotFoundError:
            continue
        if mounted:
            yield Problem(name, "mount-without-layer", f"{path} is mounted", False)
            continue
        done = repair and _quarantined(store, path, problem)
        yield Problem(name, problem, f"{path} belongs to no layer", done)


def _quarantined(store: Store, path: str, problem: str) -> bool:
    """Move it into quarantine, never over another file. Whether that worked."""
    name = f"{time.time_ns()}.{problem}.{os.path.basename(path)}"[:255]
    return _done(os.rename, path, f"{store.layout.quarantine}/{name}")


def _set_mode(path: str, gid: int) -> None:
    os.chown(path, 0, gid)
    os.chmod(path, 0o710)


def _done(repair: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> bool:
    """Whether it worked; what is refused, EBUSY most of all, is left as it is."""
    try:
        repair(*args, **kwargs)
    except OSError:
        return False
    return True


def _uncounted(store: Store, mounted: Collection[LayerId]) -> Iterator[Problem]:
    for row in mountinfo.mounted_under(store.layout.mnt):
        name = row.mount_point.removeprefix(f"{store.layout.mnt}/")
        if is_id(name) and store.exists(LayerId(name)) and name not in mounted:
            yield Problem(name, "uncounted-mount", f"{row.mount_point} has no entry", False)
