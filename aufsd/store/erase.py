"""Deletes a tree, but nothing that is mounted inside it.

A mount inside has somebody else's files. A bind mount of the same file system does not even have
another device number; root file systems and home directories were deleted through such mounts
(containerd#10721, moby#35323). So each directory is opened by a call that the kernel refuses at a
mount point. What cannot be deleted stays, with the directories above it; all else is deleted.
Synchronous.
"""

import errno
import os
import stat
from dataclasses import dataclass
from typing import Final

from aufsd.kernel import btrfs, mountinfo
from aufsd.kernel.beneath import DIRECTORY, open_beneath
from aufsd.store.walk import Descent

# reasons that the text of the errno does not give
_REASONS: Final = {
    errno.EXDEV: "something is mounted there",
    errno.EBUSY: "something is mounted there",
    errno.EPERM: "it or its directory is immutable or append-only (lsattr, chattr -i -a)",
}
# with these, nothing on the file system can be deleted now; the other names are not tried
_HOPELESS: Final = (errno.EROFS, errno.EIO)


@dataclass(slots=True)
class Left:
    """What could not be deleted of a tree: how many names; path and reason of the first."""

    path: str
    errno: int
    names: int = 1

    @classmethod
    def of(cls, error: OSError, path: str) -> "Left":
        """From an error. `path` is where it was met, unless the error has a path itself."""
        return cls(str(error.filename or path), error.errno or errno.EIO)

    @property
    def why(self) -> str:
        """The reason, and how many more names there are, in words."""
        more = f", and {self.names - 1} more" if self.names > 1 else ""
        return f"{_REASONS.get(self.errno) or os.strerror(self.errno)}{more}"

    def error(self) -> OSError:
        """The same as an exception."""
        more = f", and {self.names - 1} more" if self.names > 1 else ""
        why = _REASONS.get(self.errno) or os.strerror(self.errno)
        return OSError(self.errno, f"{why}{more}", self.path)


def erase(parent: int, name: bytes, shown: str) -> Left | None:
    """Delete `name` in the directory `parent`, a tree or a file. None if all is deleted.

    `shown` is its path, for messages. A btrfs subvolume is deleted by one call, with those inside
    it.
    """
    left = _Tally(shown)
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode):
            os.unlink(name, dir_fd=parent)
            return None
        top = open_beneath(parent, name)
    except FileNotFoundError:
        return None
    except OSError as error:
        left.add("", error)
        return left.found
    try:
        if not _subvolume_went(parent, name, top):
            _empty(top, left)
            if left.found and left.found.errno == errno.ENOTEMPTY:
                # readdir(3p) may leave names out if others are deleted meanwhile
                left.found = None
                _empty(top, left)
            if left.found is None:
                os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        pass
    except OSError as error:
        if left.found is None:
            left.add("", error)
    finally:
        os.close(top)
    return left.found


def erase_at(path: str) -> Left | None:
    """The same by path. The directory above belongs to the store. Raises OSError if it cannot be
    opened.
    """
    above, name = os.path.split(path)
    parent = os.open(above, DIRECTORY)
    try:
        return erase(parent, os.fsencode(name), path)
    finally:
        os.close(parent)


@dataclass(slots=True)
class _Tally:
    top: str
    found: Left | None = None

    def add(self, path: str, error: OSError) -> None:
        """Count a name that stays. Raises the error again if it stops all other deletions too."""
        if self.found is None:
            # the error about a mount below has the whole path
            said = str(error.filename or "")
            where = said if said.startswith("/") else self.top + path
            self.found = Left(where, error.errno or errno.EIO)
        else:
            self.found.names += 1
        if error.errno in _HOPELESS and path:
            raise error


def _empty(top: int, left: _Tally) -> None:
    """Delete the content of a directory. A directory is `marked` if something in it stays."""
    with Descent(top) as here:
        _unlink_all(here, left)
        while True:
            name = here.take()
            if name is not None:
                _enter(here, name, left)
            elif here.depth:
                _leave(here, left)
            else:
                return


def _enter(here: Descent, name: bytes, left: _Tally) -> None:
    try:
        here.down(name)
    except FileNotFoundError:
        return
    except OSError as error:
        here.mark()
        left.add(here.path(name), error)
        return
    if os.fstat(here.fd).st_ino == btrfs.TOP:
        inside = here.path()
        below = os.dup(here.fd)
        try:
            here.up()
            if _subvolume_went(here.fd, name, below):
                return
        except OSError as error:
            here.mark()
            left.add(inside, error)
            return
        finally:
            os.close(below)
        here.down(name)
    _unlink_all(here, left)


def _leave(here: Descent, left: _Tally) -> None:
    name, stays, depth = here.name, here.marked, here.depth
    here.up()
    if here.depth != depth - 1:
        return  # moved away meanwhile
    if not stays:
        try:
            os.rmdir(name, dir_fd=here.fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            left.add(here.path(name), error)
        else:
            return
    here.mark()


def _unlink_all(here: Descent, left: _Tally) -> None:
    """Delete all entries but directories, which come later."""
    with os.scandir(here.fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                here.later(entry.name)
                continue
            try:
                os.unlink(entry.name, dir_fd=here.fd)
            except FileNotFoundError:
                pass
            except OSError as error:
                here.mark()
                left.add(here.path(os.fsencode(entry.name)), error)


# --- subvolumes -------------------------------------------------------------------------------


def _subvolume_went(parent: int, name: bytes, top: int) -> bool:
    """Delete `top` by one call, if it is a subvolume. Whether it was deleted.

    False if it has subvolumes inside that cannot be named from here. Then it is emptied as any
    directory, and they are met on the way. Raises OSError; EBUSY if something is mounted in it.
    """
    if not btrfs.is_subvolume(os.fstat(top), top):
        return False
    try:
        mounted = mountinfo.mounted_under(os.readlink(f"/proc/self/fd/{top}"))
    except OSError:
        return False  # a path that is longer than paths can be
    if mounted:
        # the kernel would unmount it with the subvolume (d_invalidate() in fs/dcache.c)
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), mounted[0].mount_point)
    if btrfs.is_read_only(top):
        btrfs.set_read_only(top, False)
    for id, directory in btrfs.nested(top):
        try:
            inside = btrfs.ino_lookup_user(top, directory, id)
            _destroy_inner(top, inside)
        except OSError:
            return False
    if btrfs.nested(top):
        return False
    btrfs.snap_destroy(parent, name)
    return True


def _destroy_inner(top: int, path: bytes) -> None:
    """Delete a subvolume inside another, by its path from there, if it has none inside."""
    above, name = os.path.split(path)
    directory = open_beneath(top, above or b".")
    try:
        inner = open_beneath(directory, name)
        try:
            if btrfs.nested(inner):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
            if btrfs.is_read_only(inner):
                btrfs.set_read_only(inner, False)
            btrfs.snap_destroy(directory, name)
        finally:
            os.close(inner)
    finally:
        os.close(directory)
