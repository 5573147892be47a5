"""The layer that is being written: the current directory, and attributes that are set at the end.

Entries are made in the current directory of the process. The layer is the root of the process. So a
symlink in the middle of a name leads to a place inside the layer, as it does for Docker and GNU
tar, and `..` ends at the root. Directories are kept as a tree of names, without paths, so a step to
the next directory takes the same time at any depth.
"""

import errno
import os
import stat
from collections.abc import Callable
from itertools import pairwise
from typing import Final

from aufsd.archive.compact import Seen
from aufsd.archive.directories import PATH_MAX, Directory, Marks, erase, step
from aufsd.archive.meter import shown
from aufsd.archive.names import ROOT
from aufsd.store import whiteouts
from aufsd.store.dialect import Dialect
from aufsd.store.walk import Way
from aufsd_client.errors import BadArchive

DEFAULT_ACL: Final = "system.posix_acl_default"
# Directories that are kept at a time, at some 300 bytes each. If there are more, some get their
# final attributes, and are looked up again if another entry comes for them.
_KNOWN_MAX: Final = 1 << 16


class Tree:
    """Moves through the layer, makes and removes. `fresh` says that it was empty at the start.

    In a layer with earlier content `_put` are the names that this archive put there. `_hidden` are
    names that an aufs whiteout stands for, in a layer without earlier content; while `hides` is
    false there are none. `at` is the path of the current directory, as the archive has it.
    """

    def __init__(self, dialect: Dialect, namespace: str, *, fresh: bool) -> None:
        self.dialect = dialect
        self.fresh = fresh
        self.root = self.here = Directory(None, Way(None, b""), os.stat(b"/"))
        os.chdir(b"/")
        # the one that is the current directory of the process; None if that is not known
        self._stand: Directory | None = self.root
        self._take_default_acl(self.here)
        # whether anything was taken away: then sizes have to be measured
        self.removed = False
        self._namespace = namespace
        self._opaque_xattr = whiteouts.opaque_xattr(namespace)
        self._put = Seen()
        self._hidden = Seen()
        # how often an inode has been a directory's that went, for the names in those two
        self._went: dict[int, int] = {}
        self.hides = dialect is Dialect.AUFS and not fresh
        # directories in which whiteouts were made: some of them may have nothing below to hide
        self.marked: dict[int, Directory] = {}
        # whether there are more than those
        self.marked_more = False
        # symlinks that lead to a known directory: where they lie, and their names
        self._links: list[tuple[Directory, bytes]] = []
        self._known = 1
        # whether one that was known may be met again as if it were not
        self._forgot = False
        self.at: bytes | None = ROOT
        self._marks = Marks()

    # --- moving -------------------------------------------------------------------------------

    def enter(self, path: bytes, implied: Callable[[Way], None]) -> None:
        """Make the directory `path` the current one; what is missing on the way is made.

        `implied` gives a directory made here its attributes. Raises BadArchive if a file is in the
        way.
        """
        if path != self.at:
            self._walk(path, implied)

    def reach(self, path: bytes) -> bool:
        """As `enter`, but for a directory that is not there: nothing is made, and it is False."""
        if path == self.at:
            return True
        try:
            self._walk(path, None)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def approach(self, path: bytes) -> bytes:
        """Go to the last directory on the way to one that is not there; the name that it lacks."""
        try:
            self._walk(path, None)
        except (FileNotFoundError, NotADirectoryError) as error:
            self.go(self.here)
            return os.fsencode(error.filename)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    def moved(self) -> None:
        """Somebody else has changed the current directory of the process."""
        self._stand = None

    def go(self, directory: Directory) -> None:
        """Make a known directory the current one."""
        if self._stand is not directory:
            stand, self._stand = self._stand, None
            step(stand or self.root, directory, known=stand is not None)
            self._stand = directory
        self.here = directory
        self.at = None

    def _walk(self, path: bytes, implied: Callable[[Way], None] | None) -> None:
        here, rest = self.root, path
        if self.at and path.startswith(self.at + b"/"):
            here, rest = self.here, path[len(self.at) + 1 :]
        self.at = None
        parts = rest.split(b"/") if rest else []
        parts.reverse()
        while parts and (known := here.below.get(parts[-1])) is not None:
            here = known
            parts.pop()
        self.go(here)
        while parts:
            part = parts.pop()
            # behind a symlink they may be known
            known = here.below.get(part)
            if known is None:
                here = self._step(here, part, implied)
            else:
                here = known
                self.go(here)
        self.at = path

    def _step(
        self, here: Directory, part: bytes, implied: Callable[[Way], None] | None
    ) -> Directory:
        """From the directory `here` into one that is not known yet."""
        made = False
        way = Way(here.way, part)
        try:
            found = os.lstat(part)
        except FileNotFoundError:
            if implied is None:
                raise
            self.make_directory(part, 0o755)
            found = os.lstat(part)
            made = True
        if stat.S_ISLNK(found.st_mode):
            self._follow(way, implied)
            self._links.append((here, part))
            below = self.here
        else:
            if not stat.S_ISDIR(found.st_mode):
                if implied is None:
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), part)
                if not self._is_whiteout(found):
                    raise BadArchive(f"{shown(way.path())} is not a directory")
                self.make_directory(part, 0o755)
                found = os.lstat(part)
                made = True
            self._stand = None
            os.chdir(part)
            if made and implied is not None:
                implied(way)
                found = os.stat(b".")
            below = self._stand = self._add(here, way, found)
            if made or not self.fresh or self._forgot:
                self._take_default_acl(below)
        self._note(here, part)
        here.below[part] = self.here = below
        return below

    def _follow(self, way: Way, implied: Callable[[Way], None] | None) -> None:
        """Go where a symlink in the current directory leads, as if by the way without symlinks."""
        self._stand = None
        try:
            os.chdir(way.name)
        except (FileNotFoundError, NotADirectoryError):
            if implied is None:
                raise
            raise BadArchive(f"{shown(way.path())} is not a directory") from None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise BadArchive(f"{shown(way.path())} leads in a circle") from None
        here = self.root
        for part in os.getcwdb().split(b"/"):
            if part:
                known = here.below.get(part)
                if known is None or known.above is not here:
                    self.go(here)
                    found = os.lstat(part)
                    os.chdir(part)
                    known = self._stand = here.below[part] = self._add(
                        here, Way(here.way, part), found
                    )
                    if not self.fresh or self._forgot:
                        self._take_default_acl(known)
                here = known
        self.go(here)

    def _add(self, above: Directory, way: Way, found: os.stat_result) -> Directory:
        self._known += 1
        return Directory(above, way, found)

    def _take_default_acl(self, directory: Directory, name: bytes = b".") -> None:
        if DEFAULT_ACL in os.listxattr(name):
            directory.default_acl = os.getxattr(name, DEFAULT_ACL)
            os.removexattr(name, DEFAULT_ACL)

    def record(self, name: bytes) -> Directory:
        """What is known of the directory `name` in the current one, or of that itself, `.`."""
        if name == b".":
            return self.here
        known = self.here.below.get(name)
        if known is None:
            if self._known >= _KNOWN_MAX:
                self._forget()
            known = self.here.below[name] = self._add(
                self.here, Way(self.here.way, name), os.lstat(name)
            )
            if not self.fresh or self._forgot:
                self._take_default_acl(known, name)
        return known

    def finish(self) -> None:
        """Give directories what waits till nothing is written any more."""
        for directory in list(self.root.known()):
            self._give(directory)

    def _give(self, directory: Directory) -> None:
        times = (directory.mtime, directory.mtime)
        if directory.way.size < PATH_MAX and not directory.default_acl:
            os.utime(b"/" + directory.way.path(), ns=times, follow_symlinks=False)
            return
        self.go(directory)
        if directory.default_acl:
            os.setxattr(b".", DEFAULT_ACL, directory.default_acl)
        os.utime(b".", ns=times)

    def _forget(self) -> None:
        """Give all but those on the way to here what waits, and know no more of them."""
        here, at = self.here, self.at
        way = here.above_it()
        kept = set(map(id, way))
        for directory in list(self.root.known()):
            if id(directory) not in kept:
                self._give(directory)
        for directory in way:
            directory.below = {}
        for above, below in pairwise(way):
            above.below[below.way.name] = below
        self._links.clear()
        self._known = len(way)
        self._forgot = True
        self.go(here)
        self.at = at

    # --- making and removing in the current directory -----------------------------------------

    def note(self, name: bytes) -> None:
        """Remember that this archive put `name` here."""
        self._note(self.here, name)

    def _note(self, directory: Directory, name: bytes) -> None:
        if not self.fresh:
            self._put.add(self._key(directory.inode, name))

    def _key(self, inode: int, name: bytes) -> bytes:
        """A name in a directory, as `_put` and `_hidden` have it."""
        return b"%x.%x.%b" % (inode, self._went.get(inode, 0), name)

    def is_put(self, name: bytes) -> bool:
        """Whether this archive put `name` here."""
        return self.fresh or self._key(self.here.inode, name) in self._put

    def make_directory(self, name: bytes, mode: int) -> bool:
        """Make a directory, or keep the one that is there; whether it is new.

        One made over a whiteout, or over a file of earlier content, does not show what lies below.
        """
        opaque = False
        try:
            os.mkdir(name, mode)
        except FileExistsError:
            found = os.lstat(name)
            if stat.S_ISDIR(found.st_mode):
                if self.unhide(name):
                    self.set_opaque(name)
                return False
            opaque = not self.is_put(name) or self._is_whiteout(found)
            self.clear(name)
            os.mkdir(name, mode)
        if self.unhide(name) or opaque:
            self.set_opaque(name)
        return True

    def unhide(self, name: bytes) -> bool:
        """Take away an aufs whiteout of `name`; whether there was one."""
        if not self.hides:
            return False
        if self.fresh:
            key = self._key(self.here.inode, name)
            if key not in self._hidden:
                return False
            self._hidden.discard(key)
        try:
            os.unlink(whiteouts.WHITEOUT + name)
        except FileNotFoundError:
            return False
        except OSError as error:
            # a name too long to have had one
            if error.errno != errno.ENAMETOOLONG:
                raise
            return False
        return True

    def whiteout(self, name: bytes) -> bool:
        """Hide what lies below under `name`; whether a mark was made for that.

        What this archive put here itself stays (it hides what lies below, as a file does by itself
        and a directory if it is opaque); earlier content of that name goes.
        """
        try:
            found = os.lstat(name)
        except FileNotFoundError:
            return self._make_whiteout(name)
        if self.dialect is Dialect.OVERLAY and whiteouts.is_whiteout_node(found):
            self.note(name)
            return False
        if not self.is_put(name):
            self.clear(name)
            return self._make_whiteout(name)
        if stat.S_ISDIR(found.st_mode):
            self.keep_put(name)
            self.set_opaque(name)
        return False

    def is_opaque(self) -> bool:
        """Whether the current directory is opaque."""
        if self.dialect is Dialect.OVERLAY:
            return whiteouts.has_opaque_xattr(b".", self._namespace)
        return os.path.lexists(whiteouts.OPAQUE)

    def says(self, name: bytes) -> bool:
        """Whether the current directory says anything of a name: an entry, or that it is gone."""
        if os.path.lexists(name):
            return True
        return self.dialect is Dialect.AUFS and os.path.lexists(whiteouts.WHITEOUT + name)

    def set_opaque(self, name: bytes) -> None:
        """Make a directory opaque."""
        if self.dialect is Dialect.NONE:
            return
        if self.dialect is Dialect.OVERLAY:
            os.setxattr(name, self._opaque_xattr, b"y", follow_symlinks=False)
            return
        if not self.fresh:
            self._put.add(self._key(os.stat(name).st_ino, whiteouts.OPAQUE))
        self._make_mark(name + b"/" + whiteouts.OPAQUE)

    def keep_put(self, name: bytes) -> None:
        """Remove from a directory, `.` for this one, what this archive did not put there."""
        if self.fresh:
            return
        before, at = self.here, self.at
        levels = [self._keep_put_here(self.record(name))]
        while levels:
            if levels[-1]:
                levels.append(self._keep_put_here(self.record(levels[-1].pop())))
                continue
            levels.pop()
            if levels:
                assert self.here.above is not None
                self.go(self.here.above)
        self.go(before)
        self.at = at

    def _keep_put_here(self, directory: Directory) -> list[bytes]:
        """Go into a directory and remove what was not put there; the directories that were."""
        self.go(directory)
        kept = []
        with os.scandir(b".") as entries:
            found = list(entries)
        for entry in found:
            if not self.is_put(entry.name):
                self.clear(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                kept.append(entry.name)
        return kept

    def clear(self, name: bytes) -> None:
        """Remove whatever has this name, with all that is in it."""
        self.removed = True
        try:
            os.unlink(name)
        except IsADirectoryError:
            for inode in erase(name):
                self.marked.pop(inode, None)
                if self.hides or not self.fresh:
                    self._went[inode] = self._went.get(inode, 0) + 1
            self.at = None
        gone = self.here.below.pop(name, None)
        if gone is not None and gone.above is self.here:
            self._known -= sum(1 for _ in gone.known())
        if self._links:
            # what went may be on the way of one of them
            for directory, link in self._links:
                directory.below.pop(link, None)
            self._links.clear()
            self.at = None

    def _make_whiteout(self, name: bytes) -> bool:
        if self.dialect is Dialect.NONE:
            # what was to be hidden is gone
            return False
        if len(self.marked) < _KNOWN_MAX:
            self.marked[self.here.inode] = self.here
        else:
            self.marked_more = True
        if self.dialect is Dialect.OVERLAY:
            os.mknod(name, whiteouts.WHITEOUT_NODE, whiteouts.WHITEOUT_DEVICE)
            self.note(name)
            return True
        if self.fresh:
            self._hidden.add(self._key(self.here.inode, name))
        self.hides = True
        return self._make_mark(whiteouts.WHITEOUT + name)

    def _make_mark(self, path: bytes) -> bool:
        if b"/" not in path:
            self.note(path)
        return self._marks.make(self.here, path)

    def _is_whiteout(self, found: os.stat_result) -> bool:
        return self.dialect is Dialect.OVERLAY and whiteouts.is_whiteout_node(found)
