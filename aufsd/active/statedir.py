"""The state directory. It belongs to one daemon at a time, and its journal to one store.

All daemons of a host have the same default directory, and mounts outlive their daemon. So the
directory is locked, and the first line of the journal names its store. The journal of another store
is renamed to a name with that store's id, until that store is served here again.

The lock is flock(2) on a directory inside, which only root can open. Any user could lock the state
directory itself, and so keep a daemon from starting. By default it is also the directory of the
sockets, which `aufsctl load` locks. A directory can be made on a tmpfs without a free byte, and
systemd-tmpfiles(8) does not delete a locked directory (tmpfiles.d(5)).
"""

import errno
import fcntl
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from aufsd_client.errors import StoreLocked

JOURNAL: Final = "mounts.journal"
LOCK: Final = "lock"
FORMAT: Final = 1
# errors of a read if the name is not a regular file
NO_FILE: Final = (errno.EINVAL, errno.ELOOP, errno.ENXIO)
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Owner(NamedTuple):
    """The store of a journal: its id, "" if it has none, and its root."""

    store: str
    root: str


class Header(msgspec.Struct, tag="header", tag_field="t"):
    """The first line of a journal. An older aufsd wrote no store id."""

    format: int
    boot: str
    root: str
    store: str = ""

    def is_of(self, owner: Owner) -> bool:
        """Whether this is the journal of that store, in this boot."""
        same = self.store == owner.store or not self.store
        return same and (self.format, self.boot, self.root) == (FORMAT, boot_id(), owner.root)


_decoder = msgspec.json.Decoder(Header)


def boot_id() -> str:
    """The kernel's id of this boot (random(4), proc files)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def header_for(owner: Owner) -> Header:
    """The header for a new journal."""
    return Header(FORMAT, boot_id(), owner.root, owner.store)


def header_of(journal: bytes) -> Header | None:
    """The header of a journal; None if it cannot be parsed."""
    line, newline, _ = journal.partition(b"\n")
    with suppress(msgspec.DecodeError):
        return _decoder.decode(line) if newline else None
    return None


@dataclass(slots=True)
class StateDir:
    """A locked state directory. It owns its descriptor and that of the lock, until `close`."""

    path: str
    fd: int
    lock: int

    def file(self, name: str) -> str:
        """A file's path, for messages."""
        return f"{self.path}/{name}"

    def read(self, name: str) -> bytes:
        """The content of a file. Raises OSError."""
        try:
            fd = os.open(name, _FILE, dir_fd=self.fd)
        except OSError as error:
            error.filename = self.file(name)
            raise
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "this is no file", self.file(name))
            with open(fd, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(fd)

    def rename(self, old: str, new: str) -> None:
        """Rename a file within the directory. Raises OSError."""
        os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def give_to(self, owner: Owner) -> list[str]:
        """Give the journal of this store, if there is one, the journal's name.

        The journal of another store of this boot is renamed and never overwritten, because its
        mounts are still there, and only it has their counts. Returns messages for an operator.
        Raises OSError.
        """
        told = []
        header = self._header(JOURNAL)
        if header is not None and header.boot == boot_id() and not header.is_of(owner):
            kept = self._free_name(header.store or "older")
            self.rename(JOURNAL, kept)
            told.append(
                f"{self.file(JOURNAL)} was of another store, at {header.root}: it is kept as "
                f"{kept}, and counts again when that store is served with this state_dir"
            )
            header = None
        if header is None:
            for name in self._kept():
                found = self._header(name)
                if found is not None and found.is_of(owner):
                    self.rename(name, JOURNAL)
                    told.append(f"{self.file(name)} is of this store: its counts are taken back")
                    break
        return told

    def renew(self) -> bool:
        """Make the directory again if it was deleted, for example by a cleaner of /tmp. Whether it
        did.

        Raises OSError, also if another daemon has made and locked it meanwhile.
        """
        if os.fstat(self.fd).st_nlink:
            return False
        with suppress(FileExistsError):
            os.mkdir(self.path, 0o755)
        fresh = os.open(self.path, _DIRECTORY)
        try:
            lock = _locked(fresh)
        except OSError:
            os.close(fresh)
            raise
        self.close()
        self.fd, self.lock = fresh, lock
        return True

    def close(self) -> None:
        """Release the lock."""
        os.close(self.lock)
        os.close(self.fd)

    def _header(self, name: str) -> Header | None:
        try:
            return header_of(self.read(name))
        except OSError as error:
            if error.errno in (errno.ENOENT, *NO_FILE):
                return None
            raise

    def _kept(self) -> list[str]:
        names = os.listdir(self.fd)
        return sorted(
            name
            for name in names
            if name != JOURNAL and name.startswith("mounts.") and name.endswith(".journal")
        )

    def _free_name(self, store: str) -> str:
        taken = set(os.listdir(self.fd))
        name, number = f"mounts.{store}.journal", 1
        while name in taken:
            # a copy of a store has the same id
            number += 1
            name = f"mounts.{store}.{number}.journal"
        return name


def open_state_dir(path: str, root: str) -> StateDir:
    """Lock a state directory that exists, for the daemon of the store at `root`.

    Raises StoreLocked if another daemon has it, and OSError.
    """
    fd = os.open(path, _DIRECTORY)
    try:
        return StateDir(path, fd, _locked(fd))
    except BaseException as error:
        said = _who_has(StateDir(path, fd, -1), root)
        os.close(fd)
        if isinstance(error, BlockingIOError):
            raise StoreLocked(said, root=root) from error
        raise


def _locked(directory: int) -> int:
    """The locked descriptor. Raises BlockingIOError if another one has the lock, and OSError."""
    name = LOCK
    try:
        os.mkdir(name, 0o700, dir_fd=directory)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # no inode is left: lock the state directory itself, which is better than no lock
        name = "."
    lock = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _who_has(state: StateDir, root: str) -> str:
    try:
        header = header_of(state.read(JOURNAL))
    except OSError:
        header = None
    if header is not None and header.root == root:
        return f"another process serves {root}; `fuser {state.file(LOCK)}` says which"
    whose = "another daemon" if header is None else f"the daemon that serves {header.root}"
    return (
        f"{whose} keeps its table of mounts in {state.path}: give this one a state_dir of its own; "
        f"`fuser {state.file(LOCK)}` says which it is"
    )
