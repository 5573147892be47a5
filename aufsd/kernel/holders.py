"""Who keeps a mount busy: the processes, in every mount namespace, and by what.

Only /proc is read, and no file system that a process happens to stand on is asked anything that
could make us wait for a dead server: moby dropped its call of lsof because that hung hosts
(eac66b67be). Everything looked at may vanish meanwhile; what is gone holds nothing.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from aufsd.kernel import mountinfo
from aufsd.kernel.mountinfo import Mount
from aufsd.results import Holder

Use = Literal["cwd", "root", "exe", "fd", "map", "mount-namespace"]
_LINKS: Final[tuple[Use, ...]] = ("cwd", "root", "exe")
# file systems on which to follow a link of /proc may mean to wait for a server
_REMOTE: Final = ("nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "fuse")


@dataclass(frozen=True, slots=True)
class _Namespace:
    """A mount namespace: what the lowest pid in it sees mounted, and ids of copies of the union."""

    first: int
    mounts: Sequence[Mount]
    copies: frozenset[int]


def holders(target: str) -> list[Holder]:
    """The processes that use the mount at `target` or a copy of it, by pid; none if not mounted.

    Of another mount namespace that merely has a copy, the process with the lowest pid is named.
    What may not be looked into is left out. Raises OSError only without a /proc.
    """
    own_mounts = mountinfo.read()
    row = next((row for row in reversed(own_mounts) if row.mount_point == target), None)
    if row is None:
        return []
    # the device number of a union is its superblock's own, so it finds every copy
    own = os.readlink("/proc/self/ns/mnt")
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
    spaces: dict[str, _Namespace] = {own: _namespace(0, own_mounts, row.device)}
    member: dict[int, _Namespace] = {}
    for pid in pids:
        with suppress(OSError):
            link = os.readlink(f"/proc/{pid}/ns/mnt")
            if link not in spaces:
                spaces[link] = _namespace(pid, mountinfo.read(pid), row.device)
            member[pid] = spaces[link]
    copies = frozenset().union(*(space.copies for space in spaces.values()))
    found: list[Holder] = []
    for pid, space in member.items():
        with suppress(OSError):
            uses = list(_uses(pid, space, copies, row.device))
            if uses:
                found.append(Holder(pid, _read(f"/proc/{pid}/comm").rstrip("\n"), uses))
    return found


def _namespace(first: int, mounts: Sequence[Mount], device: int) -> _Namespace:
    return _Namespace(first, mounts, frozenset(row.id for row in mounts if row.device == device))


def _uses(pid: int, space: _Namespace, copies: Collection[int], device: int) -> Iterator[Use]:
    for link in _LINKS:
        with suppress(OSError):
            if _link_leads_in(f"/proc/{pid}/{link}", space, copies):
                yield link
    if _has_open(pid, copies):
        yield "fd"
    if _has_mapped(pid, space, device):
        yield "map"
    if pid == space.first and space.copies:
        yield "mount-namespace"


def _link_leads_in(link: str, space: _Namespace, copies: Collection[int]) -> bool:
    """Whether cwd, root or exe lies in one of the mounts, by the mount id of a descriptor on it.

    st_dev would not do: overlayfs gives files of a lower branch on another file system a number of
    that branch's own (ovl_map_dev_ino()).
    """
    mount = _mount_of(os.readlink(link), space.mounts)
    if mount is not None and mount.fstype.partition(".")[0] in _REMOTE:
        return False
    fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
    try:
        return _mount_id(_read(f"/proc/self/fdinfo/{fd}")) in copies
    finally:
        os.close(fd)


def _mount_of(path: str, mounts: Sequence[Mount]) -> Mount | None:
    """The row whose mount point is the longest directory above `path`; the last one covers."""
    best: Mount | None = None
    for row in mounts:
        above = row.mount_point.rstrip("/")
        if (path == above or path.startswith(f"{above}/")) and (
            best is None or len(above) >= len(best.mount_point.rstrip("/"))
        ):
            best = row
    return best


def _has_open(pid: int, copies: Collection[int]) -> bool:
    with suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fdinfo"):
            with suppress(OSError):
                if _mount_id(_read(f"/proc/{pid}/fdinfo/{fd}")) in copies:
                    return True
    return False


def _mount_id(fdinfo: str) -> int:
    """The id of the mount that a descriptor was opened through (proc(5)); -1 if it has none."""
    _, found, rest = fdinfo.partition("mnt_id:\t")
    return int(rest.partition("\n")[0]) if found else -1


def _has_mapped(pid: int, space: _Namespace, device: int) -> bool:
    """Whether a mapped file shows the union's device or a path in it.

    Before Linux 6.6 a map shows the device of the branch's file, but the path in the union all the
    same. A process in uninterruptible sleep may hold the lock that reading its maps waits for.
    """
    points = tuple(f"{row.mount_point}/" for row in space.mounts if row.id in space.copies)
    with suppress(OSError):
        if _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[0] == "D":
            return False
        for line in _read(f"/proc/{pid}/maps").splitlines():
            # "7f00-7f01 r--p 00000000 00:2a 1234   /path/of the/file (deleted)"
            _, _, _, number, inode, *path = line.split(None, 5)
            if inode == "0":
                continue
            major, minor = number.split(":")
            if os.makedev(int(major, 16), int(minor, 16)) == device:
                return True
            if path and path[0].startswith(points):
                return True
    return False


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()
