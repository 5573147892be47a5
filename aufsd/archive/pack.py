"""A layer's own content as a tar.

Works in the current directory of a process of its own and moves through the tree with fchdir(2), so
that no path is ever longer than one name. Nothing follows a symlink.
"""

import errno
import os
import stat
from collections.abc import Collection, Iterator
from operator import itemgetter
from typing import Final, NamedTuple, TypeAlias

from aufsd.archive import headers
from aufsd.archive.attributes import Owners, exported, read_xattr
from aufsd.archive.meter import Meter, shown
from aufsd.archive.requests import Settings
from aufsd.archive.sink import Sink
from aufsd.archive.view import Layer
from aufsd.store import dialect as marks
from aufsd_client.errors import LayerDamaged

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# not to wait for a writer, should a name have become a fifo since it was listed
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# of a name that was listed a moment ago
GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
_END: Final = bytes(2 * headers.BLOCK)


class Packer:
    """Writes entries. Knows what one looks like in a tar, not which there are."""

    __slots__ = ("_incomplete", "_links", "_owners", "_settings", "meter", "sink")

    def __init__(self, sink: Sink, settings: Settings, meter: Meter) -> None:
        self.sink = sink
        self.meter = meter
        self._settings = settings
        self._owners = Owners(settings, outward=True)
        self._links: dict[tuple[int, int], bytes] = {}
        overlay = f"{settings.namespace}.overlay"
        self._incomplete = (f"{overlay}.redirect", f"{overlay}.metacopy")

    def whiteout(self, name: bytes) -> None:
        """A mark: an empty regular file, the same on every union file system."""
        self.meter.entries += 1
        self.sink.write(headers.encode(name, headers.REGULAR, mode=0o444, uid=0, gid=0))

    def directory(self, name: bytes, fd: int, layer: Layer) -> list[str]:
        """A directory, by its descriptor; returns the names of all its xattrs."""
        found = os.fstat(fd)
        uid, gid = self._owners.both(found.st_uid, found.st_gid, name)
        self.meter.entries += 1
        names = os.listxattr(fd)
        self.sink.write(
            headers.encode(
                name + b"/",
                headers.DIRECTORY,
                mode=found.st_mode,
                uid=uid,
                gid=gid,
                mtime=layer.mtime(fd, found) // 1_000_000_000,
                xattrs=self._xattrs(fd, name, names) if names else (),
            )
        )
        return names

    def file(self, name: bytes, fd: int, found: os.stat_result) -> None:
        """A regular file with its content, or a link to the name it was written under before."""
        link = self._linked(name, found) if found.st_nlink > 1 else b""
        names = () if link else os.listxattr(fd)
        uid, gid = self._owners.both(found.st_uid, found.st_gid, name)
        mode, size, mtime = found.st_mode, found.st_size, found.st_mtime_ns // 1_000_000_000
        self.meter.entries += 1
        if link:
            self.sink.write(
                headers.encode(
                    name, headers.LINK, mode=mode, uid=uid, gid=gid, mtime=mtime, link=link
                )
            )
            return
        header = headers.encode_plain(name, mode, uid, gid, size, mtime) if not names else None
        if header is None:
            header = headers.encode(
                name,
                headers.REGULAR,
                mode=mode,
                uid=uid,
                gid=gid,
                size=size,
                mtime=mtime,
                xattrs=self._xattrs(fd, name, names) if names else (),
            )
        missing = self.sink.file(header, fd, size)
        if missing:
            self.meter.warn(
                f"{shown(name)} shrank by {missing} bytes while it was read; zeros stand there"
            )

    def other(self, name: bytes, found: os.stat_result, target: bytes) -> None:
        """A symlink (to `target`), device or fifo; a socket is left out."""
        mode = found.st_mode
        device = None
        if stat.S_ISLNK(mode):
            kind = headers.SYMLINK
        elif stat.S_ISFIFO(mode):
            kind = headers.FIFO
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            kind = headers.CHARACTER if stat.S_ISCHR(mode) else headers.BLOCK_DEVICE
            device = (os.major(found.st_rdev), os.minor(found.st_rdev))
        elif stat.S_ISSOCK(mode):
            self.meter.warn(f"left out the socket {shown(name)}")
            return
        else:
            self.vanished(name, replaced())
            return
        link = self._linked(name, found) if found.st_nlink > 1 else b""
        uid, gid = self._owners.both(found.st_uid, found.st_gid, name)
        self.meter.entries += 1
        self.sink.write(
            headers.encode(
                name,
                headers.LINK if link else kind,
                mode=mode,
                uid=uid,
                gid=gid,
                mtime=found.st_mtime_ns // 1_000_000_000,
                link=link or target,
                device=None if link else device,
            )
        )

    def finish(self) -> None:
        """The end marker."""
        self.sink.write(_END)
        self.sink.flush()

    def vanished(self, name: bytes, error: OSError) -> None:
        """Say that an entry was listed and is gone; any other error is raised again."""
        if error.errno not in GONE:
            raise error
        self.meter.warn(f"{shown(name)} went away while the layer was read")

    def _linked(self, name: bytes, found: os.stat_result) -> bytes:
        key = (found.st_dev, found.st_ino)
        first = self._links.setdefault(key, name)
        return b"" if first is name else first

    def _xattrs(self, fd: int, name: bytes, names: Collection[str]) -> list[tuple[bytes, bytes]]:
        for incomplete in self._incomplete:
            if incomplete in names:
                why = f"it has the attribute {incomplete}: part of it lies in another layer"
                raise LayerDamaged(
                    f"{shown(name)} cannot be read by itself: {why}",
                    entry=shown(name),
                    problem=why,
                )
        return exported(
            names, lambda text: read_xattr(fd, text), self._settings, self._owners, name
        )


# a name as it goes into the tar, and what it stands for; nothing for a mark
_Row: TypeAlias = tuple[bytes, "os.DirEntry[bytes] | None"]


def pack(packer: Packer, layer: Layer) -> None:
    """Write the layer that the current directory is the root of.

    `./` comes first, names without `./` after it; within a directory they are sorted by the bytes
    they have in the tar, so that both dialects give the same stream.
    """
    levels: list[tuple[int, bytes, Listed]] = []

    def enter(fd: int, name: bytes, prefix: bytes, *, opaque: bool, cut: bool) -> None:
        xattrs = packer.directory(name, fd, layer)
        if layer.overlay and not opaque and layer.opaque_xattr in xattrs:
            opaque = layer.is_opaque(fd)
        os.fchdir(fd)
        here = listed(packer.meter, layer, prefix, opaque=opaque, cut=cut)
        levels.append((fd, prefix, here))

    enter(os.open(".", _DIRECTORY), b".", b"", opaque=False, cut=False)
    while levels:
        fd, prefix, here = levels[-1]
        for name, entry in here.rows:
            if entry is None:
                packer.whiteout(prefix + name)
            elif entry.is_file(follow_symlinks=False):
                pack_file(packer, prefix + name, name)
            elif not entry.is_dir(follow_symlinks=False):
                pack_other(packer, prefix + name, name)
            else:
                path = prefix + name
                try:
                    below = os.open(name, _DIRECTORY)
                except OSError as error:
                    packer.vanished(path, error)
                    continue
                enter(below, path, path + b"/", opaque=name in here.opaque, cut=here.cut)
                break
        else:
            os.close(fd)
            levels.pop()
            if levels:
                os.fchdir(levels[-1][0])
    packer.finish()


class Listed(NamedTuple):
    """What a directory holds, sorted; the same in both dialects.

    `opaque` are directories that stand beside a whiteout of their own name, which means that.
    `cut`: for what the directories in it hold, nothing lies below in this layer's parents.
    """

    rows: Iterator[_Row]
    opaque: Collection[bytes]
    cut: bool


def listed(meter: Meter, layer: Layer, prefix: bytes, *, opaque: bool, cut: bool | None) -> Listed:
    """List the current directory, which is `opaque` also if a whiteout of its name says so.

    `cut`: one above it is opaque. Then, or if it is opaque itself, whiteouts in it hide nothing,
    and are left out (whiteouts.py); but not in the root, which is always merged. None: not at all.
    """
    rows: list[_Row] = [(marks.OPAQUE, None)] if opaque else []
    deleted = set()
    with os.scandir(b".") as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(marks.WHITEOUT):
                if layer.aufs and name == marks.OPAQUE:
                    if not opaque:
                        rows.append((name, None))
                elif layer.aufs and (hidden := marks.deleted_name(name)) is not None:
                    deleted.add(hidden)
                elif not (layer.aufs and not prefix and name in marks.HOUSEKEEPING):
                    meter.warn(
                        f"left out {shown(prefix + name)}: an archive cannot hold such a name"
                    )
            elif layer.overlay and _is_whiteout(layer, entry):
                deleted.add(name)
            else:
                rows.append((name, entry))
    beside = deleted.intersection([name for name, _ in rows]) if deleted else ()
    if cut is not None:
        cut = cut or opaque or any(entry is None for _, entry in rows)
        if cut and prefix:
            deleted = set()
    # what stands beside a whiteout of its own is there, and what lies below it is not
    rows += [(marks.WHITEOUT + name, None) for name in deleted.difference(beside)]
    rows.sort(key=itemgetter(0))
    return Listed(iter(rows), beside, bool(cut))


def _is_whiteout(layer: Layer, entry: os.DirEntry[bytes]) -> bool:
    """Whether this entry of the current directory is overlayfs's; seldom asks the kernel."""
    if not layer.may_be_whiteout(entry):
        return False
    try:
        return layer.is_whiteout(entry.name, os.lstat(entry.name), None)
    except OSError as error:
        if error.errno not in GONE:
            raise
        return False


def pack_file(packer: Packer, path: bytes, name: bytes, directory: int | None = None) -> None:
    """Write the regular file `name` of a directory, the current one if None, as `path`."""
    try:
        fd = os.open(name, _FILE, dir_fd=directory)
    except OSError as error:
        packer.vanished(path, error)
        return
    try:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode):
            packer.file(path, fd, found)
        else:
            packer.vanished(path, replaced())
    finally:
        os.close(fd)


def pack_other(packer: Packer, path: bytes, name: bytes, directory: int | None = None) -> None:
    """Write what is neither a regular file nor a directory; as `pack_file`."""
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        target = read_link(name, directory) if stat.S_ISLNK(found.st_mode) else b""
    except OSError as error:
        packer.vanished(path, error)
    else:
        packer.other(path, found, target)


def read_link(name: bytes, directory: int | None = None) -> bytes:
    """readlink(2). Raises FileNotFoundError if it is no symlink any more."""
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        raise replaced() if error.errno == errno.EINVAL else error from None


def replaced() -> FileNotFoundError:
    """The error for a name that stands for another kind of file than when it was listed."""
    return FileNotFoundError(errno.ENOENT, "another file took its name")
