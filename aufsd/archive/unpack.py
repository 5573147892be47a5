"""Unpacks a tar into a layer, in the layer's dialect.

It runs in a process of its own whose root is the layer (confine.py). names.py checks each name
before anything is touched, and tree.py finds its directory. An entry gets owner, xattrs, mode and
times in this order, because chown(2) clears set-id bits and capabilities. Directories get their
times at the end.
"""

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from typing import Final

from aufsd.archive import errnos, headers, holes, names, settling
from aufsd.archive.attributes import (
    KEPT_UNTIL,
    Owners,
    chown,
    device,
    imported,
    is_one,
    keep_only,
    set_time,
)
from aufsd.archive.directories import Directory, directory_of
from aufsd.archive.fingerprint import Memory
from aufsd.archive.headers import Member
from aufsd.archive.meter import Meter, shown
from aufsd.archive.names import ROOT
from aufsd.archive.reader import Reader
from aufsd.archive.requests import Settings
from aufsd.archive.tally import Tally
from aufsd.archive.tree import DEFAULT_ACL, Tree
from aufsd.store import whiteouts
from aufsd.store.dialect import Dialect
from aufsd.store.walk import Way
from aufsd_client.errors import ArchiveEscape, BadArchive, LimitExceeded

_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# "contiguous" in old tars; a regular file here
_FILES: Final = (headers.REGULAR, b"7")
# GNU tar's incremental archives have a list of names as the body of a directory
_DIRECTORIES: Final = (headers.DIRECTORY, b"D")
# a volume's label, Solaris's ACL, what names a Solaris file
_NO_FILE: Final = (b"V", b"A", b"N")
_SPECIAL_BITS: Final = 0o7000
_ROOT_OWNED: Final = (0, 0)
_NO_FILES: Final = frozenset((b".", b".."))
_DOT: Final = ord(".")
_STEP: Final = 16 << 20
_NODES: Final = {
    headers.CHARACTER: stat.S_IFCHR,
    headers.BLOCK_DEVICE: stat.S_IFBLK,
    headers.FIFO: stat.S_IFIFO,
}
# Makes the current directory's attributes those of the same directory in the layers below, if any.
Inherit = Callable[[Way], bool]


class Unpacker:
    """Unpacks one tar into the layer that is the root directory."""

    def __init__(
        self,
        reader: Reader,
        dialect: Dialect,
        settings: Settings,
        meter: Meter,
        inherit: Inherit,
        lies_below: settling.Below | None = None,
    ) -> None:
        with os.scandir(b"/") as entries:
            fresh = next(entries, None) is None
        self._reader = reader
        self._dialect = dialect
        self._settings = settings
        self._depth = settings.limits.depth
        self._meter = meter
        self._inherit = inherit
        self._base = lies_below is None
        self._lies_below = lies_below or settling.nowhere
        self._waiting = settling.Waiting()
        # whether whiteouts were left out that hide nothing
        self.settled = False
        self._owners = Owners(settings, outward=False)
        self._tree = Tree(dialect, settings.namespace, fresh=fresh)
        self._tally = Tally(settings.limits, self._tree)
        # of the current entry, for directories that it implies
        self._mtime = 0
        self._told: set[bytes] = set()
        # whether an entry says what `/` is to be
        self._root_named = False
        # what was made; nothing of a layer that held something before
        self.memory = Memory() if fresh else None

    def run(self) -> int:
        """Unpack everything; the bytes of the layer's regular files afterwards.

        Raises BadArchive, ArchiveEscape, LimitExceeded, NoSpace, StreamBroken.
        """
        os.umask(0)
        for member in self._reader.members():
            name = member.name
            try:
                self._member(member)
            except OSError as error:
                raise errnos.answer(error, name, offset=member.start) or error from error
            except (BadArchive, ArchiveEscape, LimitExceeded) as error:
                error.data.setdefault("entry", shown(name))
                error.data.setdefault("offset", member.start)
                raise
        tree = self._tree
        if whiteouts.PLINKS in self._told and os.path.lexists(b"/" + whiteouts.PLINKS):
            tree.enter(ROOT, self._implied)
            tree.clear(whiteouts.PLINKS)
        self._settle_whiteouts()
        if self._base and tree.fresh and not self._root_named:
            # not the time of day: the same tar has to give the same layer
            tree.root.mtime = 0
        tree.finish()
        if self.memory and tree.removed:
            self.memory.forget()
        return self._tally.total()

    # --- one entry ----------------------------------------------------------------------------

    def _member(self, member: Member) -> None:
        raw = member.name
        kind = member.kind
        if kind in _NO_FILE:
            self._meter.warn(f"left out {shown(raw)}, of type {shown(kind)}, which holds no file")
            return
        path = member.name = names.inside(raw)
        if 0 < self._depth < len(path) and path.count(b"/") >= self._depth:
            raise LimitExceeded(f"an entry more than {self._depth} directories deep")
        self._mtime = member.mtime
        if path.find(b".wh.") >= 0 and self._mark(path, member):
            return
        if path == ROOT:
            if kind not in _DIRECTORIES:
                if not raw:
                    raise BadArchive("an entry without a name")
                raise ArchiveEscape("an entry would take the place of the layer's root")
            self._root_named = True
            self._tree.enter(ROOT, self._implied)
            self._directory(b".", ROOT, member, made=False)
            return
        directory, _, name = path.rpartition(b"/")
        if directory != self._tree.at:
            self._tree.enter(directory, self._implied)
        if kind in _FILES:
            self._file(name, member)
            if self._tree.fresh and raw.endswith(name):
                self._plain_files(raw[: -len(name)])
        elif kind in _DIRECTORIES:
            made = self._tree.make_directory(name, member.mode & 0o1777)
            self._tally.add(made)
            self._directory(name, path, member, made=made)
        elif kind == headers.SYMLINK:
            if not member.link:
                raise BadArchive(f"{shown(path)} is a symlink to nothing")
            self._make(name, partial(os.symlink, member.link, name))
            self._tally.add(1)
            self._owner(name, member)
            if member.xattrs:
                self._set_xattrs(name, member)
            set_time(name, member.mtime, member.name, self._meter)
        elif kind == headers.LINK:
            self._link(name, path, member)
        elif kind in _NODES:
            self._node(name, path, member)
        else:
            raise BadArchive(f"{shown(path)} has the unknown type {shown(kind)}")
        if not self._tree.fresh:
            self._tree.note(name)

    def _file(self, name: bytes, member: Member) -> None:
        size = member.size
        mode = member.mode
        body: memoryview | None = None
        try:
            fd = os.open(name, _CREATE, mode & 0o777)
        except FileExistsError:
            self._tree.clear(name)
            fd = os.open(name, _CREATE, mode & 0o777)
        try:
            self._tally.add(1, size)
            if member.extents is not None:
                self._sparse(fd, member)
            elif size:
                body = self._reader.small_body(size)
                # a file that the window holds whole takes one write
                if body is None or os.write(fd, body) < size:
                    body = None
                    self._large(fd, size)
                elif size > holes.PIECE:
                    holes.punch(fd, 0, size)
            uid, gid = self._owners.both(member.uid, member.gid, member.name)
            if uid or gid or self._tree.here.setgid:
                chown(fd, uid, gid, member.name)
            if member.xattrs:
                self._set_xattrs(fd, member)
            if mode & _SPECIAL_BITS:
                os.fchmod(fd, mode)
            set_time(fd, member.mtime, member.name, self._meter)
            if self.memory and body is not None and size <= holes.PIECE and not member.xattrs:
                found, inode = os.fstat(fd), self._tree.here.inode
                owner, time = (found.st_uid, found.st_gid), found.st_mtime_ns
                self.memory.note(inode, name, found.st_mode, owner, time, body)
        finally:
            os.close(fd)
        if self._tree.hides:
            self._tree.unhide(name)

    def _plain_files(self, prefix: bytes) -> None:
        """Make the plain files that follow in the current directory, which the tar calls `prefix`.

        Ends before one that is not as simple as that, for whatever reason.
        """
        tree, tally, owners = self._tree, self._tally, self._owners
        if tree.hides or self.memory is None:
            return
        setgid = tree.here.setgid
        note, inode = self.memory.note, tree.here.inode
        entries, room = tally.room()
        for name, (mode, uid, gid), mtime, body in self._reader.plain(prefix):
            size = len(body)
            if (
                mode & _SPECIAL_BITS
                or size > holes.PIECE
                or mtime >= KEPT_UNTIL
                or (name[0] == _DOT and (name in _NO_FILES or name.startswith(whiteouts.WHITEOUT)))
                or entries < 1
                or size > room
                or (owner := owners.known.get((uid, gid))) is None
            ):
                return
            try:
                fd = os.open(name, _CREATE, mode)
            except OSError:
                return
            try:
                if size and os.write(fd, body) < size:
                    raise OSError(errno.ENOSPC, "")
                if owner != _ROOT_OWNED or setgid:
                    os.fchown(fd, *owner)
                os.utime(fd, ns=(mtime, mtime))
            except OSError:
                os.unlink(name)
                return
            finally:
                os.close(fd)
            tally.add(1, size)
            entries -= 1
            room -= size
            if mtime < KEPT_UNTIL:
                note(inode, name, stat.S_IFREG | mode, owner, mtime, body)

    def _large(self, fd: int, size: int) -> None:
        os.lseek(fd, 0, os.SEEK_SET)
        at, sparse = 0, True
        while at < size:
            step = min(size - at, _STEP)
            self._reader.copy(fd, step)
            # before the kernel writes them out, so that a hole never fills the disk
            sparse = sparse and holes.punch(fd, at, at + step)
            at += step

    def _sparse(self, fd: int, member: Member) -> None:
        assert member.extents is not None
        for offset, length in zip(*member.extents, strict=True):
            os.lseek(fd, offset, os.SEEK_SET)
            self._reader.copy(fd, length)
        os.ftruncate(fd, member.size)

    def _directory(self, name: bytes, path: bytes, member: Member, *, made: bool) -> None:
        tree = self._tree
        inherits = made and tree.here.setgid
        uid, gid = self._owners.both(member.uid, member.gid, member.name)
        if uid or gid or inherits or not made:
            os.chown(name, uid, gid, follow_symlinks=False)
        if not made:
            keep_only(name, {key for key, _ in member.xattrs or ()}, self._settings)
        record = tree.record(name)
        record.default_acl = b""
        if member.xattrs:
            self._set_xattrs(name, member, record)
        if member.mode & 0o6000 or inherits or not made:
            os.chmod(name, member.mode)
        record.mtime = member.mtime
        if not 0 <= member.mtime < KEPT_UNTIL:
            # to see what becomes of it; it is set again when all is written
            set_time(name, member.mtime, member.name, self._meter)
        record.setgid = bool(member.mode & stat.S_ISGID)

    def _link(self, name: bytes, path: bytes, member: Member) -> None:
        target = names.inside(member.link)
        if not target:
            raise BadArchive(f"{shown(path)} is a hard link to nothing")
        if not names.is_pseudo_link(target):
            names.check_content(target)
        try:
            with directory_of(target) as (fd, source):
                if self._dialect is Dialect.OVERLAY and whiteouts.is_whiteout_node(
                    os.stat(source, dir_fd=fd, follow_symlinks=False)
                ):
                    raise BadArchive(f"{shown(path)} is a hard link to a deleted file")
                try:
                    os.link(source, name, src_dir_fd=fd, follow_symlinks=False)
                except FileExistsError:
                    if is_one(os.stat(source, dir_fd=fd, follow_symlinks=False), name):
                        # given twice, or a link to itself, which some tools write: it is there
                        return
                    self._tree.clear(name)
                    os.link(source, name, src_dir_fd=fd, follow_symlinks=False)
                self._tree.unhide(name)
        except FileNotFoundError:
            raise BadArchive(
                f"{shown(path)} is a hard link to {shown(target)}, which the archive has not put "
                "into the layer"
            ) from None
        except PermissionError:
            raise BadArchive(f"{shown(path)} is a hard link to a directory") from None
        if self.memory:
            self.memory.link(os.lstat(name).st_ino)
        self._tally.add(1)

    def _node(self, name: bytes, path: bytes, member: Member) -> None:
        kind = _NODES[member.kind]
        number = 0
        if member.kind != headers.FIFO:
            number = device(member, path)
            hidden = self._dialect is Dialect.OVERLAY or self._settings.node_whiteouts
            if kind == stat.S_IFCHR and number == 0 and hidden:
                raise ArchiveEscape(f"{shown(path)} would read as a deleted file in this store")
        try:
            self._make(name, partial(os.mknod, name, kind | member.mode & 0o777, number))
        except PermissionError:
            # as in any user namespace but the first
            self._meter.warn(f"left out the device {shown(path)}: making one is not permitted")
            return
        self._tally.add(1)
        self._owner(name, member)
        if member.xattrs:
            self._set_xattrs(name, member)
        os.chmod(name, member.mode)
        set_time(name, member.mtime, member.name, self._meter)

    # --- marks --------------------------------------------------------------------------------

    def _mark(self, path: bytes, member: Member) -> bool:
        """Take a name of the union's own for what it means; False if it is content after all."""
        if names.is_housekeeping(path):
            return self._housekeeping(path, member)
        deleted = names.mark(path)
        if deleted is None:
            return False
        if member.kind not in (headers.REGULAR, headers.LINK, b"7"):
            raise ArchiveEscape(f"{shown(path)} stands for a deleted file, and is no regular file")
        directory = path.rpartition(b"/")[0]
        if not deleted:
            self._tree.enter(directory, self._implied)
            self._tree.keep_put(b".")
            self._tree.set_opaque(b".")
            self._tally.add(self._dialect is Dialect.AUFS)
        elif self._tree.reach(directory):
            self._tally.add(self._tree.whiteout(deleted))
        else:
            self._waiting.add(directory, deleted)
        return True

    def _settle_whiteouts(self) -> None:
        """Put on disk what waited for its directory, and take away what hides nothing."""
        tree, lies_below = self._tree, self._lies_below
        if self._dialect is Dialect.NONE:
            # what is hidden goes from the layer itself, and lies nowhere else
            lies_below = settling.nowhere
        for directory, name in self._waiting.those_to_make(tree, lies_below):
            tree.enter(directory, self._implied)
            self._tally.add(tree.whiteout(name))
        taken = settling.settle(tree, lies_below)
        self._tally.add(-taken)
        self.settled = bool(taken) or self._waiting.left_out

    def _housekeeping(self, path: bytes, member: Member) -> bool:
        """aufs's own at the top of a branch is dropped; what links point to is kept meanwhile."""
        top = path.split(b"/", 1)[0]
        if top not in self._told:
            self._told.add(top)
            self._meter.warn(f"left out {shown(top)}, which aufs keeps for itself")
        if names.is_pseudo_link(path) and path.count(b"/") == 1:
            name = path.rpartition(b"/")[2]
            self._tree.enter(whiteouts.PLINKS, lambda _: None)
            if member.kind == headers.REGULAR:
                self._file(name, member)
            elif member.kind == headers.LINK:
                self._link(name, path, member)
        return True

    # --- parts --------------------------------------------------------------------------------

    def _make(self, name: bytes, make: Callable[[], None]) -> None:
        """Make an entry in the place of whatever has its name."""
        try:
            make()
        except FileExistsError:
            self._tree.clear(name)
            make()
        self._tree.unhide(name)

    def _owner(self, name: bytes, member: Member) -> None:
        uid, gid = self._owners.both(member.uid, member.gid, member.name)
        if uid or gid or self._tree.here.setgid:
            chown(name, uid, gid, member.name)

    def _set_xattrs(
        self, where: bytes | int, member: Member, directory: Directory | None = None
    ) -> None:
        assert member.xattrs is not None
        if self.memory and directory is None:
            self.memory.plain = False
        for name, value in imported(
            member.xattrs, self._settings, self._owners, member.name, self._meter
        ):
            if directory is not None and name == DEFAULT_ACL:
                directory.default_acl = value
                continue
            try:
                if isinstance(where, int):
                    os.setxattr(where, name, value)
                else:
                    os.setxattr(where, name, value, follow_symlinks=False)
            except OSError as error:
                if not errnos.is_attribute_refused(error):
                    raise
                self._meter.warn(
                    f"dropped the attribute {name} of {shown(member.name)}: {error.strerror}"
                )

    def _implied(self, way: Way) -> None:
        """The current directory has just been made, because an entry lies in it."""
        self._tally.add(1)
        if self._inherit(way):
            return
        os.chown(b".", *self._owners.both(0, 0, way.name))
        os.chmod(b".", 0o755)
        # not the time of day: the same tar has to give the same layer
        os.utime(b".", ns=(self._mtime, self._mtime))
