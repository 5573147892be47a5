"""The branches of several layers as the content of one: what they show together, with its marks.

Files of layers that go away are hard links of theirs. Those of layers that stay are reflinks, or
copies where the file system has none: the new layer is written to later, and they must not change.
The strict rule decides what shows (view.py). Whoever runs this sees the whole store on one mount,
for a hard link does not lead from one mount to another.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from aufsd.archive.attributes import read_xattr
from aufsd.archive.meter import Meter
from aufsd.archive.requests import Branch
from aufsd.archive.view import Layer, Place
from aufsd.kernel.beneath import DIRECTORY, open_beneath
from aufsd.store import dialect as marks
from aufsd.store.dialect import Dialect

_CHUNK: Final = 1 << 24
# linux/fs.h: _IOW(0x94, 9, int)
_FICLONE: Final = 0x40049409
_NO_REFLINK: Final = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL)
# EMLINK: it has as many as it may have; EXDEV: another quota project; EPERM: it is immutable
_NO_LINK: Final = (errno.EMLINK, errno.EXDEV, errno.EPERM)
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def squash(
    chain: Sequence[Branch],
    kept: Sequence[str],
    staging: str,
    to: Dialect,
    namespace: str,
    meter: Meter,
    *,
    base: bool,
    roots_hide: bool,
) -> None:
    """Write into the empty directory `staging` what a chain shows by itself, its nearest first.

    `kept` are the ids in it whose content stays in use. `base`: nothing lies below the chain, so
    nothing has to be hidden. `roots_hide`: an opaque `/` hides what lies below, as it does not for
    aufs. Paths are those below the current root. Raises OSError.
    """
    store = os.open("/diff", DIRECTORY)
    target = open_beneath(os.open("/", DIRECTORY), staging.lstrip("/"))
    merge = _Merge(to, namespace, meter, base, frozenset(kept))
    places: list[Place] = []
    hidden = False
    for branch in chain:
        fd = os.open(branch.id, DIRECTORY, dir_fd=store)
        layer = Layer(branch, fd, namespace)
        places.append(Place(layer, fd))
        if marks.is_settled(fd, namespace):
            marks.mark_settled(target, namespace)
        if roots_hide and layer.is_opaque(fd):
            hidden = True
            break
    merge.tree(places, target, hidden=hidden)


@dataclass(slots=True)
class _Level:
    """A merged directory on the way: its branches' directories, and what is still to be done."""

    places: list[Place]
    target: int
    hidden: bool
    below: list[tuple[bytes, int]]


@dataclass(slots=True)
class _Merge:
    """One squash, in a dialect; `whiteout` is the first one that was made.

    `copies` has the first copy of each inode with several names in a layer that is kept.
    """

    to: Dialect
    namespace: str
    meter: Meter
    base: bool
    kept: frozenset[str]
    copies: dict[tuple[int, int], bytes] = field(default_factory=dict)
    whiteout: bytes = b""
    root: int = -1
    path: list[bytes] = field(default_factory=list)

    def tree(self, places: list[Place], target: int, *, hidden: bool) -> None:
        """Merge directories, and all below them. `hidden`: what lies below the chain is hidden."""
        self.root = target
        levels = [self._enter(places, target, hidden=hidden, own=hidden)]
        while levels:
            level = levels[-1]
            if level.below:
                name, index = level.below.pop()
                inner, ends = _descend(level.places[index:], name)
                os.mkdir(name, 0o700, dir_fd=level.target)
                made = os.open(name, DIRECTORY, dir_fd=level.target)
                self.path.append(name)
                # it hides what a directory above hides already: no mark of its own is needed
                own = ends and not level.hidden
                levels.append(self._enter(inner, made, hidden=ends or level.hidden, own=own))
                continue
            levels.pop()
            self._leave(level, top=not levels)

    def _enter(self, places: list[Place], target: int, *, hidden: bool, own: bool) -> _Level:
        """Do all of a directory but the directories in it, and note those.

        `hidden`: what lies below the chain does not show here; `own`: by this directory's own mark.
        """
        level = _Level(places, target, hidden, [])
        done: set[bytes] = set()
        top = not self.path
        for index, place in enumerate(places):
            self._one(level, index, place, done, top=top)
        if own and not self.base:
            self._mark_opaque(target)
        return level

    def _one(self, level: _Level, index: int, place: Place, done: set[bytes], *, top: bool) -> None:
        """What one branch adds to a directory; `done` are names that are decided."""
        layer, here = place.layer, set[bytes]()
        deleted: set[bytes] = set()
        os.fchdir(place.fd)
        with os.scandir(b".") as entries:
            for entry in entries:
                name = entry.name
                if layer.aufs and name.startswith(marks.WHITEOUT):
                    gone = marks.deleted_name(name)
                    if gone is not None:
                        deleted.add(gone)
                    continue
                if name in done or (top and name in marks.HOUSEKEEPING):
                    continue
                here.add(name)
                if entry.is_dir(follow_symlinks=False):
                    level.below.append((name, index))
                    continue
                if layer.may_be_whiteout(entry) and layer.is_whiteout(name, os.lstat(name), None):
                    self._whiteout(level, name)
                    continue
                self._file(level.target, name, layer)
                self.meter.entries += 1
        for name in deleted - done - here:
            self._whiteout(level, name)
        done |= here
        done |= deleted

    def _leave(self, level: _Level, *, top: bool) -> None:
        """The attributes of a directory, once all is in it."""
        _copy_attributes(level.places[0].fd, level.target, self._skipped(top=top))
        if self.to is Dialect.OVERLAY:
            impure = f"{self.namespace}.overlay.impure"
            if any(_has_xattr(place.fd, impure) for place in level.places):
                # one of the files in it may have been copied up
                os.setxattr(level.target, impure, b"y")
        self.meter.entries += 1
        self.meter.tick()
        for place in level.places:
            place.close()
        if not top:
            os.close(level.target)
            self.path.pop()

    def _skipped(self, *, top: bool) -> tuple[str, ...]:
        """Xattrs that are not taken over: opaque is said anew; staging has our marks already."""
        overlay = f"{self.namespace}.overlay."
        opaque = overlay if self.to is Dialect.AUFS else marks.opaque_xattr(self.namespace)
        return (opaque, f"{self.namespace}.aufsd.") if top else (opaque,)

    # --- marks --------------------------------------------------------------------------------

    def _mark_opaque(self, target: int) -> None:
        if self.to is Dialect.OVERLAY:
            os.setxattr(target, marks.opaque_xattr(self.namespace), b"y")
        else:
            os.close(os.open(marks.OPAQUE, _NEW, 0o444, dir_fd=target))

    def _whiteout(self, level: _Level, name: bytes) -> None:
        """Say that a name is deleted, unless nothing can be below that has it."""
        if level.hidden or self.base:
            return
        if self.to is Dialect.OVERLAY:
            os.mknod(name, marks.WHITEOUT_NODE, marks.WHITEOUT_DEVICE, dir_fd=level.target)
            return
        # one inode for all, as aufs and Docker have it
        name = marks.WHITEOUT + name
        if self.whiteout:
            try:
                os.link(self.whiteout, name, src_dir_fd=self.root, dst_dir_fd=level.target)
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.ENAMETOOLONG):
                    raise
            else:
                return
        os.close(os.open(name, _NEW, 0o444, dir_fd=level.target))
        self.whiteout = b"/".join((*self.path, name))

    # --- files --------------------------------------------------------------------------------

    def _file(self, target: int, name: bytes, layer: Layer) -> None:
        """Put a file of the current directory into another one; any type but a directory."""
        if layer.id not in self.kept:
            try:
                os.link(name, name, dst_dir_fd=target, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
            else:
                return
        found = os.lstat(name)
        known = (found.st_dev, found.st_ino)
        if found.st_nlink > 1 and known in self.copies:
            os.link(
                self.copies[known],
                name,
                src_dir_fd=self.root,
                dst_dir_fd=target,
                follow_symlinks=False,
            )
            return
        self._copy(target, name, found)
        if found.st_nlink > 1:
            self.copies[known] = b"/".join((*self.path, name))

    def _copy(self, target: int, name: bytes, found: os.stat_result) -> None:
        if stat.S_ISREG(found.st_mode):
            source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            made = os.open(name, _NEW, 0o600, dir_fd=target)
            try:
                _copy_data(source, made)
                _copy_attributes(source, made, self._skipped(top=False))
            finally:
                os.close(source)
                os.close(made)
            return
        if stat.S_ISLNK(found.st_mode):
            os.symlink(os.readlink(name), name, dir_fd=target)
        else:
            os.mknod(name, found.st_mode, found.st_rdev, dir_fd=target)
        back = os.open(b".", DIRECTORY)
        try:
            values = {each: read_xattr(name, each) for each in _xattrs_of(name)}
            os.chown(name, found.st_uid, found.st_gid, dir_fd=target, follow_symlinks=False)
            if not stat.S_ISLNK(found.st_mode):
                os.chmod(name, stat.S_IMODE(found.st_mode), dir_fd=target)
            os.fchdir(target)
            for each, value in values.items():
                os.setxattr(name, each, value, follow_symlinks=False)
            times = (found.st_atime_ns, found.st_mtime_ns)
            os.utime(name, ns=times, follow_symlinks=False)
        finally:
            os.fchdir(back)
            os.close(back)


def _descend(merged: Sequence[Place], name: bytes) -> tuple[list[Place], bool]:
    """The directories that make up `name`; and whether they hide what lies below all of them."""
    below: list[Place] = []
    for place in merged:
        try:
            fd = os.open(name, DIRECTORY, dir_fd=place.fd)
        except FileNotFoundError:
            if place.layer.hides(place.fd, name):
                return below, True
            continue
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            # a file, a symlink or overlayfs's whiteout: what lies below it does not show
            return below, True
        below.append(Place(place.layer, fd))
        if place.layer.is_opaque(fd) or place.layer.hides(place.fd, name):
            return below, True
    return below, False


def _copy_data(source: int, target: int) -> None:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _NO_REFLINK:
            raise
    else:
        return
    size, at = os.fstat(source).st_size, 0
    while at < size:
        # a hole stays one
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        end = os.lseek(source, at, os.SEEK_HOLE)
        os.lseek(target, at, os.SEEK_SET)
        while at < end:
            moved = os.sendfile(target, source, at, min(_CHUNK, end - at))
            if not moved:
                break
            at += moved
    os.ftruncate(target, size)


def _xattrs_of(where: int | bytes) -> list[str]:
    """Those that are copied: a label is the system's to set."""
    names = os.listxattr(where) if isinstance(where, int) else _listed(where)
    return [
        name for name in names if not name.startswith("security.") or name == "security.capability"
    ]


def _listed(name: bytes) -> list[str]:
    return os.listxattr(name, follow_symlinks=False)


def _has_xattr(fd: int, name: str) -> bool:
    return name in os.listxattr(fd)


def _copy_attributes(source: int, target: int, skipped: tuple[str, ...]) -> None:
    found = os.fstat(source)
    os.fchown(target, found.st_uid, found.st_gid)
    for name in _xattrs_of(source):
        if name.startswith(skipped):
            continue
        value = read_xattr(source, name)
        # a chown through aufs leaves an empty one
        if value or name != "security.capability":
            os.setxattr(target, name, value)
    os.fchmod(target, stat.S_IMODE(found.st_mode))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
