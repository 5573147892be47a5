"""A store is who it was: what its paths lead to now, held against what was locked at the start.

Paths are walked anew by each call, and meanwhile a disk may be mounted over the root, or over one
of its directories, by a boot that was late or by hand: what is made then lies on another disk, and
what is looked for is not there. A file system may also turn read-only under a running daemon.
A few statx(2) before each change, each mount and each reading tell. They do not close the moment
until the change: who may rename and mount in a store is root, and this is against accidents.
"""

import errno
import os
import stat
from dataclasses import dataclass
from typing import Final

from aufsd.kernel import syscalls
from aufsd.kernel.syscalls import Place
from aufsd.store.layout import Layout
from aufsd_client.errors import AufsdError, IncompatibleFilesystem, LayerDamaged, PermissionDenied

# an open(2) for writing says so, and writes nothing; ext4 has no other sign of it since Linux 6.15
# (ext4_file_open(), EXT4_FLAGS_EMERGENCY_RO), xfs that was shut down says EIO
_NO_WRITES: Final = (errno.EROFS, errno.EIO, errno.ESHUTDOWN, errno.EUCLEAN)


@dataclass(frozen=True, slots=True)
class Identity:
    """The directories of a store as they were when it was locked.

    Owns `root_fd`, so that no other directory is given the root's inode number meanwhile.
    """

    layout: Layout
    root_fd: int
    places: tuple[tuple[str, Place], ...]

    def problem(self, *, writing: bool = True) -> AufsdError | None:
        """Why the store cannot be used as it is now; None if it can. Does not block.

        `writing`: on a read-only file system what only reads goes on.
        """
        mount = None
        for path, before in self.places:
            try:
                now = syscalls.statx_place(path)
            except OSError as error:
                return self._another(path, error.strerror or "it cannot be seen")
            mount = now.mount if mount is None else mount
            if (now.device, now.inode) != (before.device, before.inode):
                return self._another(path, "another one stands there than when it was opened")
            if now.mount != mount:
                return self._another(path, "something is mounted there")
        return self._unwritable() if writing else None

    def verify(self, *, writing: bool = True) -> None:
        """Raise that: IncompatibleFilesystem, PermissionDenied."""
        found = self.problem(writing=writing)
        if found is not None:
            raise found

    def _another(self, path: str, what: str) -> IncompatibleFilesystem:
        return IncompatibleFilesystem(
            f"{path} is not what this daemon locked: {what}; nothing is done in it; "
            "undo that, or restart aufsd to serve what is there now",
            root=self.layout.root,
        )

    def _unwritable(self) -> PermissionDenied | None:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            os.close(os.open(self.layout.lock, flags))
        except OSError as error:
            if error.errno in _NO_WRITES:
                return PermissionDenied(
                    f"the file system of the store at {self.layout.root} takes no writes "
                    f"({error.strerror}); the kernel's log says why",
                    errno=errno.errorcode[error.errno],
                )
        return None

    def close(self) -> None:
        """Let go of the root."""
        os.close(self.root_fd)


def identify(layout: Layout) -> Identity:
    """What a store that was just locked and laid out is. Raises OSError."""
    paths = (
        *(layout.root, layout.layers, layout.diff, layout.mnt, layout.private, layout.lock),
        *(layout.staging, layout.removing),
    )
    root = os.open(layout.root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return Identity(layout, root, tuple((path, syscalls.statx_place(path)) for path in paths))
    except BaseException:
        os.close(root)
        raise


def require_directory(path: str, id: str) -> None:
    """Raise LayerDamaged unless a layer's content is a directory: a symlink leads elsewhere."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        problem = "its content directory is missing"
    else:
        if stat.S_ISDIR(found.st_mode):
            return
        problem = f"its content is no directory ({stat.filemode(found.st_mode)})"
    raise LayerDamaged(f"layer {id} is damaged: {problem}", id=id, problem=problem)
