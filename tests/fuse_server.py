"""A file system in user space that is as old, or as silent, as a test wants it: linux/fuse.h.

It has directories, and the file `silent`: that can be opened, and a request that `unanswered` names
(READ and WRITE if nothing is said) is never answered.
"""

import errno
import os
import select
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from aufsd.kernel import syscalls

READ, WRITE, GETATTR, FLUSH = 15, 16, 3, 25
_LOOKUP, _FORGET, _SETATTR, _MKDIR, _RMDIR, _RENAME = 1, 2, 4, 9, 11, 12
_OPEN, _STATFS, _RELEASE, _INIT = 14, 17, 18, 26
_OPENDIR, _READDIR, _RELEASEDIR, _INTERRUPT, _BATCH_FORGET = 27, 28, 29, 36, 42
# opcode, nodeid and the rest of struct fuse_in_header; then struct fuse_out_header
_IN, _OUT = struct.Struct("IIQQIIII"), struct.Struct("IiQ")
_ATTR = struct.Struct("6Q10I")
_ENTRY = struct.Struct("4Q2I")
_ROOT, _SILENT = 1, 2
_KNOWN = b"silent"


@dataclass
class Served:
    """A mount of it. `asked` is set once something of the silent file is waited for."""

    path: Path
    unanswered: frozenset[int]
    asked: threading.Event = field(default_factory=threading.Event)
    # the directories, by parent and name
    names: dict[tuple[int, bytes], int] = field(default_factory=dict)
    made: int = _SILENT

    @property
    def silent(self) -> Path:
        return self.path / _KNOWN.decode()


@contextmanager
def serving(target: Path, *unanswered: int) -> Iterator[Served]:
    """Mount it at the directory `target`; at the end whoever waits gets an error."""
    served = Served(target, frozenset(unanswered or (READ, WRITE)))
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
    syscalls.mount("silent", str(target), "fuse", 0, data)
    stop, stopping = os.pipe()
    thread = threading.Thread(target=_serve, args=(device, stop, served))
    thread.start()
    try:
        yield served
    finally:
        with suppress(OSError):
            # every request that waits is ended, and no new one taken (fuse_umount_begin())
            syscalls.umount2(str(target), syscalls.MNT_FORCE)
        with suppress(OSError):
            syscalls.umount2(str(target), syscalls.MNT_DETACH)
        os.close(stopping)
        thread.join()
        os.close(stop)
        os.close(device)


def _serve(device: int, stop: int, served: Served) -> None:
    while stop not in select.select([device, stop], [], [])[0]:
        try:
            request = os.read(device, 1 << 20)
        except OSError:  # it is unmounted
            return
        _, opcode, unique, node, *_ = _IN.unpack_from(request)
        if opcode in served.unanswered and node == _SILENT:
            served.asked.set()
            continue
        if opcode in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            continue
        reply = _answer(served, opcode, node, request[_IN.size :])
        failed, body = (-reply, b"") if isinstance(reply, int) else (0, reply)
        with suppress(FileNotFoundError):  # whoever asked has gone
            os.write(device, _OUT.pack(_OUT.size + len(body), failed, unique) + body)


def _answer(served: Served, opcode: int, node: int, body: bytes) -> bytes | int:
    """What a request is answered with, or an errno."""
    if opcode == _INIT:
        # protocol 7.22: the kernel refuses the flags of renameat2(2) by itself
        return struct.pack("IIIIHHI", 7, 22, 1 << 16, 0, 12, 9, 1 << 16)
    if opcode in (GETATTR, _SETATTR):
        return struct.pack("QII", 0, 0, 0) + _attributes(node)
    if opcode in (_OPEN, _OPENDIR):
        # FOPEN_DIRECT_IO: what is asked is asked of us
        return struct.pack("QII", 0, 1, 0)
    if opcode in (_RELEASE, _RELEASEDIR, FLUSH):
        return b""
    if opcode == _STATFS:
        return struct.pack("5Q10I", 0, 0, 0, 0, 0, 4096, 255, 4096, *[0] * 7)
    if opcode == _READDIR:
        return _listing(served, node, *struct.unpack_from("QQ", body))
    if opcode == _LOOKUP:
        name = body.rstrip(b"\0")
        found = _SILENT if name == _KNOWN else served.names.get((node, name))
        return errno.ENOENT if found is None else _entry(found)
    if opcode == _MKDIR:
        served.made += 1
        served.names[node, body[8:].rstrip(b"\0")] = served.made
        return _entry(served.made)
    if opcode == _RMDIR:
        del served.names[node, body.rstrip(b"\0")]
        return b""
    if opcode == _RENAME:
        (into,), names = struct.unpack_from("Q", body), body[8:].rstrip(b"\0").split(b"\0")
        served.names[into, names[1]] = served.names.pop((node, names[0]))
        return b""
    return errno.ENOSYS


def _attributes(node: int) -> bytes:
    directory = node != _SILENT
    mode = (stat.S_IFDIR | 0o755) if directory else (stat.S_IFREG | 0o666)
    size = 0 if directory else 1 << 40
    return _ATTR.pack(
        node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, os.getuid(), os.getgid(), 0, 4096, 0
    )


def _entry(node: int) -> bytes:
    return _ENTRY.pack(node, 0, 0, 0, 0, 0) + _attributes(node)


def _listing(served: Served, node: int, _handle: int, offset: int) -> bytes:
    listed = b""
    names = [(name, made) for (above, name), made in served.names.items() if above == node]
    for number, (name, made) in list(enumerate(names, 1))[offset:]:
        entry = struct.pack("QQII", made, number, len(name), stat.S_IFDIR >> 12) + name
        listed += entry + b"\0" * (-len(entry) % 8)
    return listed
