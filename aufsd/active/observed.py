"""What is mounted at a layer's mount point: the layer's own mount, or somebody else's.

An entry identifies its mount by the kernel's mount id. Without an entry, as after a lost journal,
the mount is compared with the layer: with its branches, or with its content.
Blocking where mountinfo is read.
"""

import os
import time
from collections.abc import Sequence

from aufsd.active.refs import BIND, Entry, Reference, State
from aufsd.kernel import mountinfo
from aufsd.kernel.mountinfo import Mount
from aufsd.store.ids import LayerId, is_id
from aufsd.store.layout import Layout
from aufsd.union import bind, helper, overlay

# the file system type, in mountinfo, of unions that a process serves
_FUSE = "fuse.fuse-overlayfs"


def is_mount_point(target: str) -> bool:
    """Whether anything is mounted there. Does not block."""
    try:
        return mountinfo.is_mount_point(target)
    except FileNotFoundError:
        return False


def is_served(backend: str) -> bool:
    """Whether a process serves the mounts of this backend."""
    return backend == _FUSE.removeprefix("fuse.")


def identify(target: str, backend: str) -> mountinfo.Identity | None:
    """The uppermost mount there; None if there is none. Does not block."""
    return mountinfo.identify(target, served=is_served(backend))


def is_on_top(target: str, entry: Entry) -> bool:
    """Whether the entry's own mount is the uppermost at the target. Does not block."""
    found = identify(target, entry.backend)
    return found is not None and entry.mount is not None and found.is_same(entry.mount)


def is_below(rows: Sequence[Mount], entry: Entry) -> bool:
    """Whether the entry's own mount is covered by the uppermost of these rows.

    Call it only when `is_on_top` is false. The uppermost mount may have got the id that ours had:
    the kernel uses ids again (mnt_alloc_id()).
    """
    return any(entry.mount is not None and row.id == entry.mount.id for row in rows[:-1])


def rows_at(layout: Layout) -> dict[LayerId, list[Mount]]:
    """The mountinfo rows of each mount point of the store, the uppermost last."""
    prefix = f"{layout.mnt}/"
    found: dict[LayerId, list[Mount]] = {}
    for row in mountinfo.mounted_under(layout.mnt):
        name = row.mount_point.removeprefix(prefix)
        if is_id(name):
            found.setdefault(LayerId(name), []).append(row)
    return found


def uncounted(layout: Layout, id: LayerId, row: Mount) -> Entry | None:
    """An entry that counts 1, for a mount without an entry. None if it is not the layer's own.

    A union is the layer's own if its uppermost branch is the layer's content. Whether the other
    branches are its parents' is for the backend to say (Backend.is_whole).
    """
    name = row.fstype.removeprefix("fuse.")
    content = layout.content(id)
    if bind.is_bind(row.mount_point, content):
        name, own = BIND, "ro" in row.options
    elif row.fstype == "overlay":
        own = overlay.shown_branches(row.super_options)[:1] in ((), (content,))
    elif row.fstype == _FUSE:
        serving = helper.read(layout.work(id))
        own = serving is not None and serving.device == row.device
    else:
        own = row.fstype == "aufs"
    if not own:
        return None
    now = time.time()
    return Entry(
        State.ACTIVE,
        mounted=True,
        references=(Reference(0, 0, "", "manual", now, 0),),
        read_only="ro" in row.options or "ro" in row.super_options.split(","),
        since=now,
        backend=name,
        mount=identify(row.mount_point, name),
    )


def is_read_only(target: str) -> bool:
    """Whether the mount, or its file system, is read-only. May block.

    overlayfs turns a mount read-only if it cannot make its work directory, as on a full disk.
    """
    return bool(os.statvfs(target).f_flag & os.ST_RDONLY)


def uncounted_at(layout: Layout, id: LayerId) -> Entry | None:
    """As `uncounted`, for the uppermost mount at a layer's mount point; None if there is none."""
    rows = rows_at(layout).get(id, [])
    return uncounted(layout, id, rows[-1]) if rows else None
