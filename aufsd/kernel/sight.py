"""Whether another process sees at a path what we see there: it may live in another mount namespace.

Only /proc is read, and no path is walked in the other namespace: whoever made that may have put a
server there that never answers. What the mount tables say decides: the same directory of the same
file system. A namespace that gets our mounts by propagation (mount_namespaces(7)) has it.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from aufsd.kernel import mountinfo
from aufsd.kernel.mountinfo import Mount


class Place(NamedTuple):
    """A directory: the device number of its file system's root, and its path in there."""

    device: int
    path: str


def place_of(rows: Sequence[Mount], path: str) -> Place | None:
    """What is seen at an absolute path without symlinks, by the mount table of who looks.

    None if the table does not tell: a process whose root is no mount point.
    """
    top = _first(rows)
    if top is None:
        return None
    while below := [row for row in rows if row.parent == top.id and _is_on_way(row, path)]:
        # the first one that is met on the way down; one over the top itself has the same path
        top = min(below, key=lambda row: len(row.mount_point))
    rest = path.removeprefix(top.mount_point.rstrip("/")).lstrip("/")
    return Place(top.device, f"{top.root.rstrip('/')}/{rest}".rstrip("/"))


def _first(rows: Sequence[Mount]) -> Mount | None:
    """The mount that the root of the process is, or lies lowest there."""
    ids = {row.id for row in rows}
    roots = [row for row in rows if row.mount_point == "/"]
    return next((row for row in roots if row.parent not in ids or row.parent == row.id), None)


def _is_on_way(row: Mount, path: str) -> bool:
    return row.id != row.parent and f"{path}/".startswith(f"{row.mount_point.rstrip('/')}/")


def in_our_namespace(pid: int) -> bool | None:
    """Whether the process is in our mount namespace; None if that cannot be told. Does not block.

    Who asks makes sure afterwards that the pid is still that process's.
    """
    try:
        return os.path.samestat(os.stat("/proc/self/ns/mnt"), os.stat(f"/proc/{pid}/ns/mnt"))
    except OSError:
        return None


def sees(pid: int, path: str) -> bool | None:
    """Whether the process sees at `path` what we do; None if that cannot be told. May block.

    Who asks makes sure afterwards that the pid is still that process's.
    """
    try:
        theirs = place_of(mountinfo.read(pid), path)
        ours = place_of(mountinfo.read(), path)
    except OSError:
        return None
    return None if theirs is None or ours is None else theirs == ours


def propagates(ours: Sequence[Mount], theirs: Sequence[Mount], path: str) -> bool:
    """Whether what we mount below `path` appears in the other mount table too."""
    above = [row for row in ours if _is_on_way(row, path)]
    if not above:
        return False
    lowest = max(above, key=lambda row: len(row.mount_point))
    groups = [tag.removeprefix("shared:") for tag in lowest.tags if tag.startswith("shared:")]
    wanted = {f"{kind}:{group}" for group in groups for kind in ("shared", "master")}
    return any(wanted & set(row.tags) for row in theirs)


def hidden_from_host(path: str) -> bool:
    """Whether what we mount below `path` is not seen by process 1. False if it cannot be told."""
    if in_our_namespace(1) is not False:
        return False
    try:
        return not propagates(mountinfo.read(), mountinfo.read(1), path)
    except OSError:
        return False
