"""Writes a layer's own content as a tar.

It runs in a process of its own and moves through the tree with fchdir(2), so every system call gets
a single name and no path. No symlink is followed.
"""

import errno
import os
import stat
from collections.abc import Callable, Collection
from functools import partial
from typing import Final, NamedTuple

from aufsd.archive import headers
from aufsd.archive.attributes import Owners, carried, exported, read_xattr
from aufsd.archive.listing import FILE, OTHER, SUBDIRECTORY, Listing, listed
from aufsd.archive.meter import Meter, shown
from aufsd.archive.requests import Settings
from aufsd.archive.sink import Sink
from aufsd.archive.view import GONE, Layer
from aufsd.kernel.syscalls import AT_FDCWD
from aufsd.store.walk import Descent, Way
from aufsd_client.errors import LayerDamaged

# does not wait for a writer, if the name has become a fifo since it was listed
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_END: Final = bytes(2 * headers.BLOCK)


class Inspected(NamedTuple):
    """What a tar says of a directory but its name: the names of all xattrs, and those it holds."""

    stat: os.stat_result
    mtime: int
    names: Collection[str]
    xattrs: dict[str, bytes]


class Links:
    """The first names of files that have several, until all were met."""

    __slots__ = ("_first",)

    def __init__(self) -> None:
        self._first: dict[tuple[int, int], tuple[Way, int]] = {}

    def first(self, above: Way, name: bytes, found: os.stat_result) -> bytes:
        """The path that a file of several names was met under before; empty the first time.

        It is `name` in the directory `above` now.
        """
        inode = found.st_dev, found.st_ino
        first, left = self._first.pop(inode, (None, found.st_nlink))
        if left > 1:
            self._first[inode] = first or Way(above, name), left - 1
        return first.path() if first else b""


class Packer:
    """Writes entries. Knows what one looks like in a tar, not which there are."""

    __slots__ = ("_incomplete", "_owners", "_settings", "links", "meter", "sink")

    def __init__(self, sink: Sink, settings: Settings, meter: Meter) -> None:
        self.sink = sink
        self.meter = meter
        self._settings = settings
        self._owners = Owners(settings, outward=True)
        self.links = Links()
        overlay = f"{settings.namespace}.overlay"
        self._incomplete = (f"{overlay}.redirect", f"{overlay}.metacopy")

    def whiteout(self, name: bytes) -> None:
        """A mark: an empty regular file, the same on every union file system."""
        self.meter.entries += 1
        self.sink.write(headers.encode(name, headers.REGULAR, mode=0o444, uid=0, gid=0))

    def inspect(self, fd: int, layer: Layer) -> Inspected:
        """Look at a directory of a layer."""
        found = os.fstat(fd)
        names = os.listxattr(fd)
        xattrs = carried(fd, self._settings, names) if names else {}
        return Inspected(found, layer.mtime(fd, found), names, xattrs)

    def directory(self, name: bytes, inspected: Inspected) -> None:
        """A directory."""
        found, mtime, names, xattrs = inspected
        uid, gid = self._owners.both(found.st_uid, found.st_gid, name)
        self.meter.entries += 1
        self.sink.write(
            headers.encode(
                name + b"/",
                headers.DIRECTORY,
                mode=found.st_mode,
                uid=uid,
                gid=gid,
                mtime=mtime // 1_000_000_000,
                xattrs=(
                    self._xattrs(lambda text: xattrs.get(text, b""), name, names) if names else ()
                ),
            )
        )

    def file(self, name: bytes, fd: int, found: os.stat_result, link: bytes) -> None:
        """A regular file with its content, or a link to the name it was written under before."""
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
                xattrs=self._xattrs(partial(read_xattr, fd), name, names) if names else (),
            )
        missing = self.sink.file(header, fd, size)
        if missing:
            self.meter.warn(
                f"{shown(name)} shrank by {missing} bytes while it was read; zeros stand there"
            )

    def other(self, name: bytes, found: os.stat_result, target: bytes, link: bytes) -> None:
        """A symlink (to `target`), device or fifo, or a link as in `file`; a socket is left out."""
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

    def _xattrs(
        self, read: Callable[[str], bytes], name: bytes, names: Collection[str]
    ) -> list[tuple[bytes, bytes]]:
        for incomplete in self._incomplete:
            if incomplete in names:
                why = f"it has the attribute {incomplete}: part of it lies in another layer"
                raise LayerDamaged(
                    f"{shown(name)} cannot be read by itself: {why}",
                    entry=shown(name),
                    problem=why,
                )
        return exported(names, read, self._settings, self._owners, name)


def pack(packer: Packer, layer: Layer) -> None:
    """Write the layer that the current directory is the root of.

    `./` comes first, names without `./` after it; within a directory they are sorted by the bytes
    they have in the tar, so that both dialects give the same stream.
    """
    with Descent(AT_FDCWD) as here:
        listings = [_enter(packer, layer, here, b".", opaque=False, cut=False)]
        while True:
            listing = listings[-1]
            prefix = None
            for row in listing.rows:
                if prefix is None:
                    prefix = here.way.path() + b"/" if here.depth else b""
                name, kind = row[:-2], row[-1]
                path = prefix + name
                if kind == FILE:
                    pack_file(packer, path, here.way, name)
                elif kind == SUBDIRECTORY:
                    opaque = listing.beside and layer.marks.hides(here.fd, name)
                    try:
                        here.down(name)
                    except OSError as error:
                        packer.vanished(path, error)
                        continue
                    listings.append(
                        _enter(packer, layer, here, path, opaque=opaque, cut=listing.cut)
                    )
                    break
                elif kind == OTHER:
                    pack_other(packer, path, here.way, name)
                else:
                    packer.whiteout(path)
            else:
                depth = here.depth
                if not depth:
                    break
                here.up()
                if here.depth < depth - 1:
                    packer.meter.warn(f"directories in {here.path()} were moved while it was read")
                del listings[here.depth + 1 :]
                os.fchdir(here.fd)
    packer.finish()


def _enter(
    packer: Packer, layer: Layer, here: Descent, path: bytes, *, opaque: bool, cut: bool
) -> Listing:
    """Write the directory where we stand, make it the current one, and list it."""
    inspected = packer.inspect(here.fd, layer)
    packer.directory(path, inspected)
    if layer.marks.overlay and not opaque and inspected.names:
        opaque = layer.marks.is_opaque(here.fd)
    os.fchdir(here.fd)
    return listed(packer.meter, layer, here.way, opaque=opaque, cut=cut)


def pack_file(
    packer: Packer, path: bytes, above: Way, name: bytes, directory: int | None = None
) -> None:
    """Write the regular file `name` of a directory, the current one if None, as `path`.

    The directory is `above` in the tar.
    """
    try:
        fd = os.open(name, _FILE, dir_fd=directory)
    except OSError as error:
        packer.vanished(path, error)
        return
    try:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode):
            link = packer.links.first(above, name, found) if found.st_nlink > 1 else b""
            packer.file(path, fd, found, link)
        else:
            packer.vanished(path, replaced())
    finally:
        os.close(fd)


def pack_other(
    packer: Packer, path: bytes, above: Way, name: bytes, directory: int | None = None
) -> None:
    """Write what is neither a regular file nor a directory; as `pack_file`."""
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        target = read_link(name, directory) if stat.S_ISLNK(found.st_mode) else b""
    except OSError as error:
        packer.vanished(path, error)
    else:
        link = packer.links.first(above, name, found) if found.st_nlink > 1 else b""
        packer.other(path, found, target, link)


def read_link(name: bytes, directory: int | None = None) -> bytes:
    """readlink(2). Raises FileNotFoundError if it is no symlink any more."""
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        raise replaced() if error.errno == errno.EINVAL else error from None


def replaced() -> FileNotFoundError:
    """The error for a name that stands for another kind of file than when it was listed."""
    return FileNotFoundError(errno.ENOENT, "another file took its name")
