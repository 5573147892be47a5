"""The branches of several layers as the content of one: what they show together, with its marks.

Files of layers that go away are hard links of theirs. Those of layers that stay are reflinks, or
copies where the file system has none: the new layer is written to later, and they must not change.
The strict rule decides what shows (view.py). Whoever runs this sees the whole store on one mount,
for a hard link does not lead from one mount to another.
"""

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from aufsd.archive.attributes import read_xattr
from aufsd.archive.meter import Meter
from aufsd.archive.requests import Branch
from aufsd.archive.view import Layer, Place, ascend, descend, keep, lookup, root, roots
from aufsd.kernel.beneath import DIRECTORY, open_beneath
from aufsd.store import dialect as marks
from aufsd.store import whiteouts
from aufsd.store.dialect import Dialect
from aufsd.store.walk import Descent

_CHUNK: Final = 1 << 24
# copy_file_range(2) where a file system or an old kernel does not do it
_NO_SHARING: Final = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL)
# EMLINK: it has as many as it may have; EXDEV: another quota project; EPERM: it is immutable
_NO_LINK: Final = (errno.EMLINK, errno.EXDEV, errno.EPERM)
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def squash(
    chain: Sequence[Branch],
    below: Sequence[Branch],
    kept: Sequence[str],
    staging: str,
    to: Dialect,
    namespace: str,
    meter: Meter,
    *,
    roots_hide: bool,
) -> None:
    """Write into the empty directory `staging` what a chain shows by itself, its nearest first.

    `below` is what it stands on. `kept` are the ids in it whose content stays in use. `roots_hide`:
    an opaque `/` hides what lies below, as it does not for aufs. Paths are those below the current
    root. Raises OSError.
    """
    store = os.open("/diff", DIRECTORY)
    target = open_beneath(os.open("/", DIRECTORY), staging.lstrip("/"))
    places: list[Place] = []
    hidden = False
    # and the directories that are made
    kept_open = keep(len(chain) + len(below) + 1)
    for branch in chain:
        place = root(store, branch, namespace, kept_open)
        places.append(place)
        if marks.is_settled(place.fd, namespace):
            marks.mark_settled(target, namespace)
        if roots_hide and place.layer.marks.is_opaque(place.fd):
            hidden = True
            break
    under = [] if hidden else roots(store, below, namespace, beside=len(chain) + 1)
    with Descent(target, kept_open) as made:
        merge = _Merge(to, namespace, meter, bool(below), frozenset(kept), made, target)
        merge.tree(places, under, hidden=hidden)
        if merge.settled:
            marks.mark_settled(target, namespace)


@dataclass(slots=True)
class _Level:
    """A merged directory on the way: its branches' directories, and what is still to be done.

    `under` are those of what the chain stands on, none if nothing shows from there.
    """

    places: list[Place]
    under: list[Place]
    hidden: bool
    below: list[tuple[bytes, int]]


@dataclass(slots=True)
class _Merge:
    """One squash, in a dialect; `made` is where it stands in the new content, `root` its top.

    `stands`: whether the chain stands on something. `settled`: whether a whiteout was left out, for
    what lies below has no such directory. `copies` has the first copy of each inode with several
    names in a layer that is kept, `whiteout` the first one that was made.
    """

    to: Dialect
    namespace: str
    meter: Meter
    stands: bool
    kept: frozenset[str]
    made: Descent
    root: int
    copies: dict[tuple[int, int], bytes] = field(default_factory=dict)
    whiteout: bytes = b""
    settled: bool = False

    def tree(self, places: list[Place], under: list[Place], *, hidden: bool) -> None:
        """Merge directories, and all below them. `hidden`: what lies below the chain is hidden."""
        levels = [self._enter(places, under, hidden=hidden, own=hidden)]
        while levels:
            level = levels[-1]
            if level.below:
                name, index = level.below.pop()
                inner, ends = _descend(level.places[index:], name)
                os.mkdir(name, 0o700, dir_fd=self.made.fd)
                self.made.down(name)
                # it hides what a directory above hides already: no mark of its own is needed
                own = ends and not level.hidden
                under = [] if ends else _below(level.under, name)
                levels.append(self._enter(inner, under, hidden=ends or level.hidden, own=own))
                continue
            levels.pop()
            self._leave(level)

    def _enter(self, places: list[Place], under: list[Place], *, hidden: bool, own: bool) -> _Level:
        """Do all of a directory but the directories in it, and note those.

        `hidden`: what lies below the chain does not show here; `own`: by this directory's own mark.
        """
        level = _Level(places, under, hidden, [])
        done: set[bytes] = set()
        for index, place in enumerate(places):
            self._one(level, index, place, done)
        if own and self.stands:
            self._mark_opaque(self.made.fd)
        return level

    def _one(self, level: _Level, index: int, place: Place, done: set[bytes]) -> None:
        """What one branch adds to a directory; `done` are names that are decided."""
        layer, here = place.layer, set[bytes]()
        deleted: set[bytes] = set()
        os.fchdir(place.fd)
        with os.scandir(b".") as entries:
            for entry in entries:
                name = entry.name
                if layer.marks.aufs and name.startswith(whiteouts.WHITEOUT):
                    gone = whiteouts.deleted_name(name)
                    if gone is not None:
                        deleted.add(gone)
                    continue
                if name in done or (not place.depth and name in whiteouts.HOUSEKEEPING):
                    continue
                here.add(name)
                if entry.is_dir(follow_symlinks=False):
                    level.below.append((name, index))
                    continue
                if layer.marks.is_whiteout_entry(entry):
                    self._whiteout(name, level)
                    continue
                self._file(self.made.fd, name, layer)
                self.meter.entries += 1
        for name in deleted - done - here:
            self._whiteout(name, level)
        done |= here
        done |= deleted

    def _leave(self, level: _Level) -> None:
        """The attributes of a directory, once all is in it; go up."""
        target, depth = self.made.fd, self.made.depth
        _copy_attributes(level.places[0].fd, target, self._skipped(top=not depth))
        if self.to is Dialect.OVERLAY:
            impure = f"{self.namespace}.overlay.impure"
            if any(_has_xattr(place.fd, impure) for place in level.places):
                # one of the files in it may have been copied up
                os.setxattr(target, impure, b"y")
        self.meter.entries += 1
        self.meter.tick()
        if not depth:
            return
        self.made.up()
        reached = ascend((*level.places, *level.under), depth - 1)
        if reached != depth - 1 or self.made.depth != depth - 1:
            raise OSError(errno.ESTALE, "directories were moved while layers were squashed")

    def _skipped(self, *, top: bool) -> tuple[str, ...]:
        """Xattrs that are not taken over: opaque is said anew; staging has our marks already."""
        overlay = f"{self.namespace}.overlay."
        opaque = overlay if self.to is Dialect.AUFS else whiteouts.opaque_xattr(self.namespace)
        return (opaque, f"{self.namespace}.aufsd.") if top else (opaque,)

    # --- marks --------------------------------------------------------------------------------

    def _mark_opaque(self, target: int) -> None:
        if self.to is Dialect.OVERLAY:
            os.setxattr(target, whiteouts.opaque_xattr(self.namespace), b"y")
        else:
            os.close(os.open(whiteouts.OPAQUE, _NEW, 0o444, dir_fd=target))

    def _whiteout(self, name: bytes, level: _Level) -> None:
        """Say that a name is deleted, unless nothing can be below that has it.

        In a directory that nothing else is merged into overlayfs lists a whiteout as a name.
        """
        if not level.under:
            self.settled = self.settled or (self.stands and not level.hidden)
            return
        target = self.made.fd
        if self.to is Dialect.OVERLAY:
            os.mknod(name, whiteouts.WHITEOUT_NODE, whiteouts.WHITEOUT_DEVICE, dir_fd=target)
            return
        # one inode for all, as aufs and Docker have it
        name = whiteouts.WHITEOUT + name
        if self.whiteout:
            try:
                os.link(self.whiteout, name, src_dir_fd=self.root, dst_dir_fd=target)
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.ENAMETOOLONG):
                    raise
            else:
                return
        os.close(os.open(name, _NEW, 0o444, dir_fd=target))
        self.whiteout = self._path(name)

    def _path(self, name: bytes) -> bytes:
        """A name of the directory where we stand, from the new content's top on."""
        return b"/".join((*self.made.way.names(), name))

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
            self.copies[known] = self._path(name)

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
    """Go into the directories that make up `name`: the places that did, and whether they hide all.

    All, that is what lies below the last of the chain.
    """
    below: list[Place] = []
    for place in merged:
        hidden = place.layer.marks.hides(place.fd, name)
        try:
            place.down(name)
        except FileNotFoundError:
            if hidden:
                return below, True
            continue
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            # a file, a symlink or overlayfs's whiteout: what lies below it does not show
            return below, True
        below.append(place)
        if hidden or place.layer.marks.is_opaque(place.fd):
            return below, True
    return below, False


def _below(merged: Sequence[Place], name: bytes) -> list[Place]:
    """Go into the directory that a merged view has under a name: the places that did."""
    top = lookup(merged, name) if merged else None
    if top is None or not stat.S_ISDIR(top.stat.st_mode):
        return []
    return descend(merged, name, top)


def _copy_data(source: int, target: int) -> None:
    """Copy what a file holds, by sharing its blocks where the file system can. Holes stay holes.

    copy_file_range(2) shares them on btrfs and xfs.
    """
    size, at = os.fstat(source).st_size, 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        end = os.lseek(source, at, os.SEEK_HOLE)
        while at < end:
            moved = _copy_some(source, target, at, min(_CHUNK, end - at))
            if not moved:
                return
            at += moved
    os.ftruncate(target, size)


def _copy_some(source: int, target: int, at: int, size: int) -> int:
    try:
        return os.copy_file_range(source, target, size, at, at)
    except OSError as error:
        if error.errno not in _NO_SHARING:
            raise
    os.lseek(target, at, os.SEEK_SET)
    return os.sendfile(target, source, at, size)


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
