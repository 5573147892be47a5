"""Reads the mount table: a parser of /proc/PID/mountinfo (proc(5)), and cheap questions.

To read mountinfo takes time for every mount of the host. So it is read at start, by `cleanup` and
`check`, and after errors. Whether one path is a mount point is asked with statx(2).
"""

import os
import re
import select
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from aufsd.kernel import syscalls

# show_type() and mangle() in fs/proc_namespace.c escape these as three octal digits
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")
_TRIES: Final = 5


@dataclass(frozen=True, slots=True)
class Mount:
    """One row; `device` is st_dev of the file system's root, options are as the kernel shows."""

    id: int
    parent: int
    device: int
    root: str
    mount_point: str
    options: tuple[str, ...]
    fstype: str
    source: str
    super_options: str
    # shared:N, master:N and their like (mount_namespaces(7))
    tags: tuple[str, ...] = field(default=(), compare=False)


def parse(text: bytes) -> Iterator[Mount]:
    """The rows of a mountinfo file, in its order. Raises ValueError for any other line."""
    # not splitlines(): a carriage return in a name is not escaped
    for line in text.removesuffix(b"\n").split(b"\n") if text else ():
        # "36 35 98:0 /mnt1 /mnt2 rw,noatime shared:1 - ext3 /dev/root rw": any number of tags
        # stand before the lone dash, and no field holds a space unescaped
        head, dash, tail = line.partition(b" - ")
        fields, rest = head.split(b" "), tail.split(b" ")
        if not dash or len(fields) < 6 or len(rest) < 3:
            raise ValueError(f"not a line of mountinfo: {line[:200]!r}")
        major, minor = fields[2].split(b":")
        yield Mount(
            id=int(fields[0]),
            parent=int(fields[1]),
            device=os.makedev(int(major), int(minor)),
            root=unescape(fields[3]),
            mount_point=unescape(fields[4]),
            options=tuple(unescape(fields[5]).split(",")),
            fstype=unescape(rest[0]),
            source=unescape(rest[1]),
            super_options=unescape(rest[2]),
            tags=tuple(tag.decode("ascii", "replace") for tag in fields[6:]),
        )


def unescape(field: bytes) -> str:
    """A field as the kernel's seq_path() wrote it, with its escapes undone."""
    if b"\\" in field:
        field = _ESCAPE.sub(lambda found: bytes((int(found[1], 8) & 0xFF,)), field)
    return os.fsdecode(field)


def read(pid: int | str = "self") -> list[Mount]:
    """The mounts that this process sees now.

    One read(2) returns about a page. After a mount or unmount between two reads, older kernels can
    skip a row that did not change (moby ae431b10a9). poll(2) shows such a change; then the table is
    read again, a few times.
    """
    for _ in range(_TRIES):
        with open(f"/proc/{pid}/mountinfo", "rb", buffering=0) as file:
            text = file.readall() or b""
            poll = select.poll()
            poll.register(file, select.POLLPRI)
            if not poll.poll(0):
                break
    return list(parse(text))


def mounted_under(prefix: str) -> list[Mount]:
    """The mounts at or below a directory, in the order of mounting at each point."""
    below = f"{prefix.rstrip('/')}/"
    return [row for row in read() if row.mount_point == prefix or row.mount_point.startswith(below)]


def is_mount_point(path: str) -> bool:
    """Whether something is mounted at `path`. FileNotFoundError if nothing is there at all."""
    found = syscalls.statx_mount_root(path)
    if found.known:
        return found.mounted
    # before Linux 5.8: a union is always another device than the directory above its mount point
    return os.lstat(path).st_dev != os.lstat(os.path.dirname(path)).st_dev


class Identity(NamedTuple):
    """Identifies a mount. `unique` is never used again; it is 0 if the kernel has no such id.

    `id` is the first column of mountinfo, which the kernel uses again. So without `unique` the
    device and the inode of the mount's root are compared too. The inode is 0 if a process serves
    the mount, because the process may change it.
    """

    unique: int
    id: int
    device: int
    inode: int

    def is_same(self, other: "Identity") -> bool:
        """Whether both identify the same mount; certain if the kernel has unique ids."""
        if self.unique or other.unique:
            return self.unique == other.unique
        by_inode = bool(self.inode and other.inode)
        return self[1:3] == other[1:3] and (not by_inode or self.inode == other.inode)


def identify(path: str, *, served: bool = False) -> Identity | None:
    """The uppermost mount at `path`; None if there is none. `served`: by a process (FUSE).

    Does not block.
    """
    try:
        found = syscalls.statx_mount_ids(path)
        mounted = found.root.mounted if found.root.known else is_mount_point(path)
    except FileNotFoundError:
        return None
    inode = 0 if served else found.inode
    return Identity(found.unique, found.id, found.device, inode) if mounted else None


class Changes:
    """Tells whether the mount table of this process has changed. Owns a descriptor until `close`.

    poll(2) of mountinfo reports each mount, unmount and move once (proc_pid_mountinfo(5)), before
    the call that did it returns. To ask takes a fifth of the time of an lstat(2).
    """

    def __init__(self) -> None:
        self._fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLPRI)

    def any(self) -> bool:
        """Whether the table has changed since the last call, or since this object was made."""
        return bool(self._poll.poll(0))

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)
