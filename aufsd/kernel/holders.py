"""Finds the processes that keep a mount busy, in every mount namespace, and how they use it.

It reads only /proc and /sys. It asks nothing of the file systems that processes use, because one of
them may wait for a dead server; moby stopped calling lsof because that hung hosts (eac66b67be). A
process may end while it is looked at; then it holds nothing.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from msgspec import UNSET

from aufsd.kernel import mountinfo, syscalls
from aufsd.kernel.mountinfo import Mount
from aufsd.results import Holder, Holders

Use = Literal["cwd", "root", "exe", "fd", "map", "mount-namespace"]
_LINKS: Final[tuple[Use, ...]] = ("cwd", "root", "exe")
_IN_FLIGHT: Final = re.compile(r"^scm_fds:\s*(\d+)", re.MULTILINE)
_REGISTERED: Final = re.compile(r"^ *\d+: (?!<none>)", re.MULTILINE)
# file systems where following a link of /proc may wait for a server
_REMOTE: Final = ("nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "fuse")


@dataclass(frozen=True, slots=True)
class _Namespace:
    """A mount namespace: the mounts that its lowest pid sees, and which are copies."""

    first: int
    mounts: Sequence[Mount]
    copies: frozenset[int]

    def below(self) -> tuple[str, ...]:
        """The beginning of paths in the union, in this namespace."""
        return tuple(f"{row.mount_point}/" for row in self.mounts if row.id in self.copies)


@dataclass(frozen=True, slots=True)
class _Process:
    """A process to look at. `task`: its pid, or that of a thread if its first one has ended."""

    pid: int
    task: int
    space: _Namespace


def look(target: str, *, busy: bool) -> Holders:
    """All holders of the mount at `target`.

    `busy`: the mount was just found to be busy. Then, if no holder is found, the processes that may
    hold it are named (`hidden`).
    """
    found, kernel = holders(target), in_kernel(target)
    return Holders(found or (may_hold() if busy and not kernel else []), kernel)


def holders(target: str) -> list[Holder]:
    """The processes that use the mount at `target` or a copy of it, by pid; none if not mounted.

    If another mount namespace only has a copy, its process with the lowest pid is named. Processes
    that may not be looked at are left out. Raises OSError only without a /proc.
    """
    own_mounts = mountinfo.read()
    row = next((row for row in reversed(own_mounts) if row.mount_point == target), None)
    return [] if row is None else _users(own_mounts, row.device, row.root, detached=False)


def holders_of(device: int) -> list[Holder]:
    """As `holders`, for the union with this device number.

    It may be mounted only in another mount namespace, or be detached and still open.
    """
    return _users(mountinfo.read(), device, "/", detached=True)


def _users(own_mounts: Sequence[Mount], device: int, root: str, *, detached: bool) -> list[Holder]:
    # the device number of a union is its superblock's own, so it finds every copy
    own = os.readlink("/proc/self/ns/mnt")
    spaces: dict[str, _Namespace] = {own: _namespace(0, own_mounts, device, root)}
    processes: list[_Process] = []
    for pid in _pids():
        for task in _tasks(pid):
            with suppress(OSError):
                link = os.readlink(f"/proc/{task}/ns/mnt")
                if link not in spaces:
                    spaces[link] = _namespace(pid, mountinfo.read(task), device, root)
                processes.append(_Process(pid, task, spaces[link]))
                break
    copies = frozenset().union(*(space.copies for space in spaces.values()))
    sockets = _bound(processes)
    found: list[Holder] = []
    for process in processes:
        with suppress(OSError):
            bound = _bound_sockets(process, sockets)
            uses = list(_uses(process, copies, device if root == "/" else None))
            if detached:
                uses += [use for use in _uses_detached(process, device) if use not in uses]
            if bound and "fd" not in uses:
                uses.append("fd")
            if uses:
                found.append(Holder(process.pid, _comm(process.pid), uses, bound or UNSET))
    return found


def may_hold() -> list[Holder]:
    """The processes for which the kernel keeps descriptors that it does not show, by pid.

    Such a descriptor was sent to one of their sockets and not received (SCM_RIGHTS), or is
    registered with io_uring. The kernel does not show what it is open on. If `holders` finds
    nobody, one of these must be the reason.
    """
    found: list[Holder] = []
    for pid in _pids():
        hidden = sum(_hidden(text) for text in _fdinfo(pid))
        if hidden:
            with suppress(OSError):
                found.append(Holder(pid, _comm(pid), [], hidden=hidden))
    return found


def in_kernel(target: str) -> list[str]:
    """The holders of the mount at `target` that are no processes, in words.

    A file system mounted inside, in our mount namespace; a loop device or swap on a file in it.
    """
    below = f"{target}/"
    found = [
        f"{row.fstype} mounted at {row.mount_point}"
        for row in mountinfo.read()
        if row.mount_point.startswith(below)
    ]
    with suppress(OSError):
        for name in sorted(os.listdir("/sys/block")):
            with suppress(OSError):
                # the kernel appends " (deleted)" to the path of a deleted file
                path = _read(f"/sys/block/{name}/loop/backing_file").rstrip("\n")
                if path.startswith(below):
                    found.append(f"/dev/{name} on {path}")
    with suppress(OSError):
        for line in _read("/proc/swaps").splitlines()[1:]:
            path = mountinfo.unescape(os.fsencode(line.split()[0]))
            if path.startswith(below):
                found.append(f"swap on {path}")
    return found


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())


def _tasks(pid: int) -> Iterator[int]:
    """The process, then its other threads: /proc shows nothing of a first thread that has ended.

    /proc/TID exists for every thread, though it is not listed.
    """
    yield pid
    with suppress(OSError):
        yield from (tid for tid in map(int, os.listdir(f"/proc/{pid}/task")) if tid != pid)


def _namespace(first: int, mounts: Sequence[Mount], device: int, root: str) -> _Namespace:
    # of content that is shown read-only the device is the whole disk's, and the root tells
    copies = (row.id for row in mounts if row.device == device and root in ("/", row.root))
    return _Namespace(first, mounts, frozenset(copies))


def _uses(process: _Process, copies: Collection[int], device: int | None) -> Iterator[Use]:
    space, task = process.space, process.task
    for link in _LINKS:
        if any(_link_leads_in(path, space, copies) for path in _links(process, link)):
            yield link
    if any(_mount_id(text) in copies for text in _fdinfo(task)):
        yield "fd"
    if _has_mapped(task, space, device):
        yield "map"
    if process.pid == space.first and space.copies:
        yield "mount-namespace"


def _uses_detached(process: _Process, device: int) -> Iterator[Use]:
    """How the process uses a mount of this device that is in no mount namespace."""
    known = {row.id for row in process.space.mounts}
    for link in _LINKS:
        if any(_leads_to(path, device, known) for path in _links(process, link)):
            yield link
    with suppress(OSError):
        at = f"/proc/{process.task}/fd"
        if any(_leads_to(f"{at}/{fd}", device, known) for fd in os.listdir(at)):
            yield "fd"


def _leads_to(link: str, device: int, known: Collection[int]) -> bool:
    """Whether a link of /proc leads to this device, through a mount that is not a known one.

    False of what cannot be opened. No server of a file system is asked.
    """
    with suppress(OSError):
        fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
        try:
            if _mount_id(_read(f"/proc/self/fdinfo/{fd}")) not in known:
                return syscalls.fstatx(fd).device == device
        finally:
            os.close(fd)
    return False


def _links(process: _Process, link: Use) -> Iterator[str]:
    """The link of the process, and those of threads with another one (CLONE_FS)."""
    seen: set[str] = set()
    for task in _tasks(process.pid) if link != "exe" else (process.task,):
        with suppress(OSError):
            path = f"/proc/{task}/{link}"
            leads = os.readlink(path)
            if leads not in seen:
                seen.add(leads)
                yield path


def _link_leads_in(link: str, space: _Namespace, copies: Collection[int]) -> bool:
    """Whether cwd, root or exe lies in one of the mounts, by the mount id of a descriptor on it.

    False of what cannot be opened. st_dev would not do: overlayfs gives files of a lower branch on
    another file system a number of that branch's own (ovl_map_dev_ino()).
    """
    with suppress(OSError):
        mount = _mount_of(os.readlink(link), space.mounts)
        if mount is not None and mount.fstype.partition(".")[0] in _REMOTE:
            return False
        fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
        try:
            return _mount_id(_read(f"/proc/self/fdinfo/{fd}")) in copies
        finally:
            os.close(fd)
    return False


def _mount_of(path: str, mounts: Sequence[Mount]) -> Mount | None:
    """The row with the longest mount point above `path`; of several, the last one."""
    best: Mount | None = None
    for row in mounts:
        above = row.mount_point.rstrip("/")
        if (path == above or path.startswith(f"{above}/")) and (
            best is None or len(above) >= len(best.mount_point.rstrip("/"))
        ):
            best = row
    return best


def _fdinfo(task: int) -> Iterator[str]:
    """The fdinfo of each open descriptor."""
    with suppress(OSError):
        for fd in os.listdir(f"/proc/{task}/fdinfo"):
            with suppress(OSError):
                yield _read(f"/proc/{task}/fdinfo/{fd}")


def _hidden(fdinfo: str) -> int:
    """How many descriptors a socket or an io_uring keeps, by its fdinfo.

    unix_show_fdinfo() in net/unix/af_unix.c (Linux 5.6), io_uring/fdinfo.c
    """
    sent = _IN_FLIGHT.search(fdinfo)
    _, _, rest = fdinfo.partition("\nUserFiles:")
    registered = _REGISTERED.findall(rest.partition("\nUserBufs:")[0])
    return (int(sent[1]) if sent else 0) + len(registered)


def _bound(processes: Sequence[_Process]) -> dict[str, str]:
    """The Unix sockets that are bound to a path in the union: that path, by their inode number.

    A socket holds the mount that its name was made in (unix_bind_bsd()), whatever becomes of the
    name. The kernel shows the path as bind(2) was given it: one that does not begin at the root is
    not found, nor one that another mount namespace has elsewhere.
    """
    texts: dict[str, list[list[str]]] = {}
    found: dict[str, str] = {}
    for process in processes:
        with suppress(OSError):
            link = os.readlink(f"/proc/{process.task}/ns/net")
            if link not in texts:
                # Num: RefCount Protocol Flags Type St Inode Path
                lines = _read(f"/proc/{process.task}/net/unix").split("\n")[1:]
                rows = (line.split(None, 7) for line in lines)
                texts[link] = [row for row in rows if len(row) == 8 and row[7].startswith("/")]
            below = process.space.below()
            found |= {row[6]: row[7] for row in texts[link] if row[7].startswith(below)}
    return found


def _bound_sockets(process: _Process, sockets: Mapping[str, str]) -> list[str]:
    """The paths of those that the process has open."""
    found = set()
    for fd in os.listdir(f"/proc/{process.task}/fd") if sockets else ():
        with suppress(OSError):
            # "socket:[INODE]"
            inode = os.readlink(f"/proc/{process.task}/fd/{fd}").removeprefix("socket:[")[:-1]
            if inode in sockets:
                found.add(sockets[inode])
    return sorted(found)


def _mount_id(fdinfo: str) -> int:
    """The id of the mount that a descriptor was opened through (proc(5)); -1 if it has none."""
    _, found, rest = fdinfo.partition("mnt_id:\t")
    return int(rest.partition("\n")[0]) if found else -1


def _has_mapped(task: int, space: _Namespace, device: int | None) -> bool:
    """Whether a mapped file shows the union's device or a path in it.

    Before Linux 6.6 a map shows the device of the branch's file, but the path in the union all the
    same. A process in uninterruptible sleep may hold the lock that reading its maps waits for.
    """
    below = space.below()
    with suppress(OSError):
        if _read(f"/proc/{task}/stat").rpartition(")")[2].split()[0] == "D":
            return False
        for line in _read(f"/proc/{task}/maps").splitlines():
            # "7f00-7f01 r--p 00000000 00:2a 1234   /path/of the/file (deleted)"
            _, _, _, number, inode, *path = line.split(None, 5)
            if inode == "0":
                continue
            major, minor = number.split(":")
            if os.makedev(int(major, 16), int(minor, 16)) == device:
                return True
            if path and path[0].startswith(below):
                return True
    return False


def _comm(pid: int) -> str:
    return _read(f"/proc/{pid}/comm").rstrip("\n")


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()
