"""Checks that the store's paths still lead to the store that was locked at the start.

Each call resolves paths again. Meanwhile somebody, or a late boot, may have mounted a disk over the
root or over one of its directories. Then a layer would be made on another disk, and existing layers
would be missing. A file system may also turn read-only under a running daemon. So a few statx(2)
calls check it before each change, mount and read. There is a moment between the check and the
change; only root could use it, and the check is against accidents.
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

# an open(2) for writing finds a read-only file system; since Linux 6.15 ext4 shows it in no other
# way (ext4_file_open(), EXT4_FLAGS_EMERGENCY_RO), xfs that was shut down says EIO
_NO_WRITES: Final = (errno.EROFS, errno.EIO, errno.ESHUTDOWN, errno.EUCLEAN)


@dataclass(frozen=True, slots=True)
class Identity:
    """The directories of a store as they were when it was locked.

    It owns `root_fd`: while that is open, no other directory can get the root's inode number.
    """

    layout: Layout
    root_fd: int
    places: tuple[tuple[str, Place], ...]

    def problem(self, *, writing: bool = True) -> AufsdError | None:
        """Why the store cannot be used now; None if it can. Does not block.

        `writing`: whether a read-only file system is a problem.
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
        """Raise the problem: IncompatibleFilesystem, PermissionDenied."""
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
        """Close `root_fd`."""
        os.close(self.root_fd)


def identify(layout: Layout) -> Identity:
    """The identity of a store that was just locked and laid out. Raises OSError."""
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
    """Raise LayerDamaged if a layer's content is no directory; a symlink would lead elsewhere."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        problem = "its content directory is missing"
    else:
        if stat.S_ISDIR(found.st_mode):
            return
        problem = f"its content is no directory ({stat.filemode(found.st_mode)})"
    raise LayerDamaged(f"layer {id} is damaged: {problem}", id=id, problem=problem)
