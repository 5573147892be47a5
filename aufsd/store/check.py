"""Consistency of layers/, diff/ and mnt/, and what may be put right.

Repair moves things into quarantine and makes missing directories; it deletes nothing, and touches
nothing that is mounted. Synchronous: works on a store that is served, and offline.
"""

import os
import stat
from collections.abc import Collection, Iterator

from aufsd.answers import Problem
from aufsd.kernel import mountinfo
from aufsd.store.ids import LayerId, is_id
from aufsd.store.layers import Store
from aufsd.union import dialect as dialects
from aufsd.union.dialect import Dialect


def check(
    store: Store,
    *,
    id: LayerId | None,
    deep: bool,
    repair: bool,
    mounted: Collection[LayerId] | None,
) -> list[Problem]:
    """Look at one layer, or at all and at what belongs to none.

    `mounted` are the table's ids; None where nobody serves the store, and mounts are nobody's.
    `deep` walks the content too and finds whiteouts of the wrong dialect.
    """
    if id is not None:
        store.require(id)
        return list(_layer(store, id, deep=deep, repair=repair))
    found = list(_modes(store, repair=repair))
    for known in sorted((*store.parent, *store.damaged)):
        found += _layer(store, known, deep=deep, repair=repair)
    found += _orphans(store, repair=repair)
    if mounted is not None:
        found += _uncounted(store, mounted)
    return found


def _modes(store: Store, *, repair: bool) -> Iterator[Problem]:
    layout = store.layout
    for path in (layout.root, layout.layers, layout.diff, layout.mnt):
        found = os.lstat(path)
        if stat.S_IMODE(found.st_mode) != 0o710 or (found.st_uid, found.st_gid) != (0, store.gid):
            if repair:
                os.chown(path, 0, store.gid)
                os.chmod(path, 0o710)
            detail = f"{path} is {stat.filemode(found.st_mode)} {found.st_uid}:{found.st_gid}"
            yield Problem("", "wrong-mode", f"{detail}, should be 0710 0:{store.gid}", repair)


def _layer(store: Store, id: LayerId, *, deep: bool, repair: bool) -> Iterator[Problem]:
    if id in store.damaged:
        yield Problem(id, "damaged", store.damaged[id], False)
    content = store.layout.content(id)
    if not os.path.isdir(content) or os.path.islink(content):
        yield Problem(id, "missing-content", f"{content} is not a directory", False)
        return
    mount_point = store.layout.mount_point(id)
    if not os.path.isdir(mount_point):
        if repair:
            os.mkdir(mount_point, 0o755)
        yield Problem(id, "missing-mount-point", f"{mount_point} does not exist", repair)
    half = dialects.interrupted(content, store.xattr_namespace)
    if half is not None:
        detail = f"a conversion to {half} was cut off; the next mount or convert finishes it"
        yield Problem(id, "half-converted", detail, False)
    elif deep:
        yield from _content(store, id, content)


def _content(store: Store, id: LayerId, content: str) -> Iterator[Problem]:
    """Whiteouts that this layer's dialect does not know."""
    dialect = dialects.read_dialect(content, store.xattr_namespace)
    for directory, _, names, fd in os.fwalk(content):
        for name in names:
            inside = os.path.join(directory.removeprefix(content), name)
            if dialect is Dialect.OVERLAY and name.startswith(".wh."):
                yield Problem(id, "mixed-dialects", f"{inside} is an aufs whiteout", False)
            elif dialect is Dialect.AUFS:
                found = os.lstat(name, dir_fd=fd)
                if stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
                    yield Problem(id, "mixed-dialects", f"{inside} is an overlay whiteout", False)


def _orphans(store: Store, *, repair: bool) -> Iterator[Problem]:
    layout = store.layout
    for directory, problem in ((layout.diff, "orphan-content"), (layout.mnt, "orphan-mount-point")):
        for name in sorted(os.listdir(directory)):
            if is_id(name) and store.exists(LayerId(name)):
                continue
            path = f"{directory}/{name}"
            if mountinfo.is_mount_point(path):
                yield Problem(name, "mount-without-layer", f"{path} is mounted", False)
                continue
            if repair:
                os.rename(path, f"{layout.quarantine}/{problem}.{name}")
            yield Problem(name, problem, f"{path} belongs to no layer", repair)


def _uncounted(store: Store, mounted: Collection[LayerId]) -> Iterator[Problem]:
    for row in mountinfo.mounted_under(store.layout.mnt):
        name = row.mount_point.removeprefix(f"{store.layout.mnt}/")
        if is_id(name) and store.exists(LayerId(name)) and name not in mounted:
            yield Problem(name, "uncounted-mount", f"{row.mount_point} has no entry", False)
