"""The layer that is being written: where in it we stand, and what its directories get in the end.

The current directory of the process is the directory that entries are made in. The layer is the
root of the process, so a symlink in the middle of a name leads somewhere inside, as it does for
Docker and GNU tar, and `..` ends there.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from aufsd.archive.erase import erase
from aufsd.archive.meter import shown
from aufsd.archive.names import ROOT
from aufsd.store import dialect as marks
from aufsd.store.dialect import Dialect
from aufsd_client.errors import BadArchive

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
DEFAULT_ACL: Final = "system.posix_acl_default"
# PATH_MAX is 4096 with the NUL
_PATH_MAX: Final = 4000


class Directory:
    """A directory that entries were made in: it gets `mtime` when nothing is written any more.

    New entries of a `setgid` one belong to its group until they are told otherwise. A default ACL
    would be given to new entries too, so it waits till the end.
    """

    __slots__ = ("default_acl", "inode", "mtime", "path", "setgid")

    def __init__(self, path: bytes, found: os.stat_result) -> None:
        self.path = path
        self.mtime = found.st_mtime_ns
        self.inode = found.st_ino
        self.setgid = bool(found.st_mode & stat.S_ISGID)
        self.default_acl = b""

    def inside(self, name: bytes) -> bytes:
        """The path of what lies in it under this name."""
        return self.path + b"/" + name if self.path else name


class Tree:
    """Moves through the layer, makes and removes. `fresh` says that it was empty at the start.

    In a layer with earlier content `put` are the names that this archive put there, as (inode of
    the directory, name on disk). `hidden` are names that stand beside an aufs whiteout of theirs;
    while `hides` is false there are none. `at` is the path of the current directory.
    """

    def __init__(self, dialect: Dialect, namespace: str, *, fresh: bool) -> None:
        self.dialect = dialect
        self.fresh = fresh
        self.root = self.here = Directory(ROOT, os.stat(b"/"))
        os.chdir(b"/")
        self._take_default_acl(self.here)
        # whether anything was taken away: then sizes have to be measured
        self.removed = False
        self._namespace = namespace
        self._opaque_xattr = marks.opaque_xattr(namespace)
        self._put: set[tuple[int, bytes]] = set()
        self._hidden: set[tuple[int, bytes]] = set()
        self.hides = dialect is Dialect.AUFS and not fresh
        # directories in which whiteouts were made: some of them may have nothing below to hide
        self.marked: dict[int, Directory] = {}
        self._by_path = {ROOT: self.here}
        self._by_inode = {self.here.inode: self.here}
        self.at: bytes | None = None
        self._mark_file: bytes | None = None

    # --- moving -------------------------------------------------------------------------------

    def enter(self, path: bytes, implied: Callable[[bytes], None]) -> None:
        """Make the directory `path` the current one; what is missing on the way is made.

        `implied` gives a directory made here its attributes. Raises BadArchive if a file is in the
        way.
        """
        if path == self.at:
            return
        known = self._by_path.get(path)
        if known is None:
            known = self._walk(path, implied)
        else:
            change_directory(known.path)
        self.at = path
        self.here = known

    def reach(self, path: bytes) -> bool:
        """As `enter`, but for a directory that is not there: nothing is made, and it is False."""
        if path == self.at:
            return True
        known = self._by_path.get(path)
        try:
            if known is None:
                known = self._walk(path, None)
            else:
                change_directory(known.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        self.at, self.here = path, known
        return True

    def _walk(self, path: bytes, implied: Callable[[bytes], None] | None) -> Directory:
        done = path
        while done not in self._by_path:
            done = done.rpartition(b"/")[0]
        here = self._by_path[done]
        change_directory(here.path)
        self.at = None
        for part in path[len(done) :].lstrip(b"/").split(b"/"):
            self.here = here
            done = done + b"/" + part if done else part
            made = False
            try:
                os.chdir(part)
            except (FileNotFoundError, NotADirectoryError):
                if implied is None:
                    raise
                self._make_missing(part, done)
                os.chdir(part)
                implied(done)
                made = True
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                raise BadArchive(f"{shown(done)} leads in a circle") from None
            self.note(part)
            here = self._known(done, part, made=made)
        return here

    def _make_missing(self, name: bytes, path: bytes) -> None:
        try:
            found = os.lstat(name)
        except FileNotFoundError:
            pass
        else:
            if not marks.is_whiteout_node(found) or self.dialect is not Dialect.OVERLAY:
                raise BadArchive(f"{shown(path)} is not a directory")
        self.make_directory(name, 0o755)

    def _known(self, path: bytes, part: bytes, *, made: bool) -> Directory:
        """The record of the current directory, `part` of the one that `here` still says.

        It is kept under the path that leads there with no symlink, which stays true whatever
        becomes of the symlink by which the archive got there.
        """
        known = self._by_path.get(path)
        if known is None:
            found = os.stat(b".")
            known = self._by_inode.get(found.st_ino)
            if known is None:
                own = self.here.inside(part)
                if not made and not self._is_here(found, own):
                    own = os.getcwdb().lstrip(b"/")
                known = self._by_inode[found.st_ino] = Directory(own, found)
                if made or not self.fresh:
                    self._take_default_acl(known)
            self._by_path[path] = known
        return known

    def _is_here(self, found: os.stat_result, path: bytes) -> bool:
        """Whether the current directory is what has this path from the root, and no symlink to it.

        One of a path that is longer than a path can be is taken by its name alone.
        """
        if len(path) >= _PATH_MAX:
            return True
        try:
            there = os.lstat(b"/" + path)
        except OSError:
            return False
        return there.st_ino == found.st_ino

    def _take_default_acl(self, directory: Directory) -> None:
        if DEFAULT_ACL in os.listxattr(b"."):
            directory.default_acl = os.getxattr(b".", DEFAULT_ACL)
            os.removexattr(b".", DEFAULT_ACL)

    def record(self, path: bytes, name: bytes) -> Directory:
        """The record of the directory `name` in the current one, whose path is `path`."""
        known = self._by_path.get(path)
        if known is None:
            found = os.lstat(name)
            known = self._by_inode.get(found.st_ino)
            if known is None:
                known = self._by_inode[found.st_ino] = Directory(self.here.inside(name), found)
            self._by_path[path] = known
        return known

    def finish(self) -> None:
        """Give directories what waits till nothing is written any more."""
        for directory in self._by_inode.values():
            times = (directory.mtime, directory.mtime)
            try:
                if len(directory.path) < _PATH_MAX and not directory.default_acl:
                    os.utime(b"/" + directory.path, ns=times, follow_symlinks=False)
                    continue
                change_directory(directory.path)
                if directory.default_acl:
                    os.setxattr(b".", DEFAULT_ACL, directory.default_acl)
                os.utime(b".", ns=times)
            except (FileNotFoundError, NotADirectoryError):
                # it was reached through a symlink that was replaced later
                continue

    # --- making and removing in the current directory -----------------------------------------

    def note(self, name: bytes) -> None:
        """Remember that this archive put `name` here."""
        if not self.fresh:
            self._put.add((self.here.inode, name))

    def is_put(self, name: bytes) -> bool:
        """Whether this archive put `name` here."""
        return self.fresh or (self.here.inode, name) in self._put

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
            key = (self.here.inode, name)
            if key not in self._hidden:
                return False
            self._hidden.remove(key)
        try:
            os.unlink(marks.WHITEOUT + name)
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
        if self.dialect is Dialect.OVERLAY and marks.is_whiteout_node(found):
            self.note(name)
            return False
        if not self.is_put(name):
            self.clear(name)
            return self._make_whiteout(name)
        if stat.S_ISDIR(found.st_mode):
            self.keep_put(name, found.st_ino)
            self.set_opaque(name)
        return False

    def is_opaque(self) -> bool:
        """Whether the current directory is opaque."""
        if self.dialect is Dialect.OVERLAY:
            return marks.has_opaque_xattr(b".", self._namespace)
        return os.path.lexists(marks.OPAQUE)

    def says(self, name: bytes) -> bool:
        """Whether the current directory says anything of a name: an entry, or that it is gone."""
        if os.path.lexists(name):
            return True
        return self.dialect is Dialect.AUFS and os.path.lexists(marks.WHITEOUT + name)

    def set_opaque(self, name: bytes) -> None:
        """Make a directory opaque."""
        if self.dialect is Dialect.NONE:
            return
        if self.dialect is Dialect.OVERLAY:
            os.setxattr(name, self._opaque_xattr, b"y", follow_symlinks=False)
            return
        if not self.fresh:
            self._put.add((os.stat(name).st_ino, marks.OPAQUE))
        self._make_mark(name + b"/" + marks.OPAQUE)

    def keep_put(self, name: bytes, inode: int) -> None:
        """Remove from a directory what this archive did not put there."""
        if self.fresh:
            return
        before = self.here
        fd = os.open(b".", _DIRECTORY)
        try:
            self._keep_put(name, inode)
        finally:
            os.fchdir(fd)
            os.close(fd)
            self.here = before

    def _keep_put(self, name: bytes, inode: int) -> None:
        levels = [(os.open(name, _DIRECTORY), self._keep_put_here(name, inode))]
        while levels:
            fd, names = levels[-1]
            os.fchdir(fd)
            if not names:
                os.close(fd)
                levels.pop()
                continue
            below, inode = names.pop()
            levels.append((os.open(below, _DIRECTORY), self._keep_put_here(below, inode)))

    def _keep_put_here(self, name: bytes, inode: int) -> list[tuple[bytes, int]]:
        """Go into a directory and remove what was not put there; the directories that were."""
        os.chdir(name)
        kept = []
        for entry in list(os.scandir(b".")):
            if (inode, entry.name) not in self._put:
                self.clear(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                kept.append((entry.name, entry.inode()))
        return kept

    def clear(self, name: bytes) -> None:
        """Remove whatever has this name, with all that is in it."""
        self.removed = True
        try:
            os.unlink(name)
        except IsADirectoryError:
            gone = set(erase(name))
            for inode in gone:
                self.marked.pop(inode, None)
            self._by_path = {p: d for p, d in self._by_path.items() if d.inode not in gone}
            self._by_inode = {i: d for i, d in self._by_inode.items() if i not in gone}
            self._hidden = {key for key in self._hidden if key[0] not in gone}
            self._put = {key for key in self._put if key[0] not in gone}
            self.at = None
        if len(self._by_path) > len(self._by_inode):
            # what went may be a symlink, by which a directory was known under another path
            self._by_path = {p: d for p, d in self._by_path.items() if p == d.path}
            self.at = None

    def _make_whiteout(self, name: bytes) -> bool:
        if self.dialect is Dialect.NONE:
            # what was to be hidden is gone
            return False
        self.marked[self.here.inode] = self.here
        if self.dialect is Dialect.OVERLAY:
            os.mknod(name, marks.WHITEOUT_NODE, marks.WHITEOUT_DEVICE)
            self.note(name)
            return True
        self._hidden.add((self.here.inode, name))
        self.hides = True
        return self._make_mark(marks.WHITEOUT + name)

    def _make_mark(self, path: bytes) -> bool:
        """An aufs mark: a link of the layer's first one, as aufs and Docker make them."""
        if b"/" not in path:
            self.note(path)
        try:
            if self._mark_file is not None:
                os.link(self._mark_file, path)
                return True
        except FileExistsError:
            return False
        except OSError as error:
            # the first one is gone, or has all the links that one may have
            if error.errno not in (errno.ENOENT, errno.EMLINK, errno.ENAMETOOLONG):
                raise
        try:
            os.mknod(path, stat.S_IFREG | 0o444)
        except FileExistsError:
            return False
        if self.here.setgid:
            os.chown(path, 0, 0)
        os.utime(path, ns=(0, 0))
        full = b"/%b/%b" % (self.here.path, path) if self.here.path else b"/" + path
        self._mark_file = full if len(full) < _PATH_MAX else None
        return True

    def _is_whiteout(self, found: os.stat_result) -> bool:
        return self.dialect is Dialect.OVERLAY and marks.is_whiteout_node(found)


def change_directory(path: bytes) -> None:
    """chdir(2) to a path from the root, however long it is."""
    if len(path) < _PATH_MAX:
        os.chdir(b"/" + path)
        return
    os.chdir(b"/")
    while path:
        cut = len(path) if len(path) < _PATH_MAX else path.rindex(b"/", 0, _PATH_MAX)
        os.chdir(path[:cut])
        path = path[cut + 1 :]


@contextmanager
def directory_of(path: bytes) -> Iterator[tuple[int | None, bytes]]:
    """A descriptor and a name by which system calls reach `path` from the root."""
    if len(path) < _PATH_MAX:
        yield None, b"/" + path
        return
    directory, _, name = path.rpartition(b"/")
    here = os.open(b".", _DIRECTORY)
    try:
        change_directory(directory)
        there = os.open(b".", _DIRECTORY)
        os.fchdir(here)
    finally:
        os.close(here)
    try:
        yield there, name
    finally:
        os.close(there)
