"""Layers on disk: create, parents, children, remove, and swapping content in.

`layers/<id>` is a layer's commit point: the layer exists when that file does. It lists the parents,
nearest first, one a line, as Docker's driver writes it. The whole index (who stands on whom) is
read once, at `open_store`; after that no operation looks at more than its own layer.

Synchronous. One `Store` belongs to one daemon, which calls the `_on_disk` halves from a thread and
keeps two of them from touching one id at the same time.
"""

import contextlib
import errno
import fcntl
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from aufsd.kernel import syscalls
from aufsd.store import content as contents
from aufsd.store.content import copy_attributes, erase, fsync
from aufsd.store.ids import LayerId
from aufsd.store.index import read_index
from aufsd.store.layout import Layout
from aufsd.union.backend import XattrNamespace
from aufsd_client.errors import (
    LayerDamaged,
    LayerExists,
    LayerNotFound,
    NoSpace,
    StoreLocked,
    StoreNotAdopted,
)

Sync = Literal["filesystem", "none"]

FORMAT = 1
# a whole store may be walked by root and the remapped group only: 0701 let any user of the host
# run set-id files out of images (moby 03f1c3d78f, CVE-2021-41091)
_MODE = 0o710
# says that a removal has passed its point of no return; recovery finishes it
REMOVING_XATTR = "aufsd.removing"
# stands on a subvolume that is to be a layer's content; without a parents file, recovery undoes it
CREATING_XATTR = "aufsd.creating"


class Format(msgspec.Struct, forbid_unknown_fields=False):
    """`.aufsd/format`: that this store is ours to serve, and which backend wrote to it last."""

    format: int = FORMAT
    adopted: bool = False
    backend: str = ""


@dataclass(slots=True)
class Store:
    """An open store: its lock, and the index of its layers.

    `parent` has None for a base layer. `damaged` are layers whose record on disk cannot be trusted;
    they are not in `parent`. Owns the descriptor of the lock until `close`.

    With `snapshots` each layer is a subvolume of btrfs, and began as a snapshot of its parent.
    """

    layout: Layout
    sync: Sync
    uid: int
    gid: int
    format: Format
    xattr_namespace: XattrNamespace
    lock_fd: int
    snapshots: bool = False
    parent: dict[LayerId, LayerId | None] = field(default_factory=dict)
    children: dict[LayerId, set[LayerId]] = field(default_factory=dict)
    damaged: dict[LayerId, str] = field(default_factory=dict)
    _serial: "itertools.count[int]" = field(default_factory=itertools.count)

    # --- questions, from memory ---------------------------------------------------------------

    def exists(self, id: LayerId) -> bool:
        """Whether there is such a layer, damaged ones included."""
        return id in self.parent or id in self.damaged

    def require(self, id: LayerId) -> None:
        """Raise LayerNotFound or LayerDamaged unless the layer can be worked with."""
        if id in self.damaged:
            raise LayerDamaged(
                f"layer {id} is in quarantine: {self.damaged[id]}",
                id=id,
                problem=self.damaged[id],
            )
        if id not in self.parent:
            raise LayerNotFound(f"there is no layer {id}", id=id)

    def chain(self, id: LayerId) -> tuple[LayerId, ...]:
        """The layer and its parents, nearest first."""
        self.require(id)
        found = [id]
        while (above := self.parent[found[-1]]) is not None:
            self.require(above)
            found.append(above)
        return tuple(found)

    def children_of(self, id: LayerId) -> frozenset[LayerId]:
        """The layers that stand directly on this one."""
        return frozenset(self.children.get(id, ()))

    # --- creating -----------------------------------------------------------------------------

    def register(self, id: LayerId, parent: LayerId | None) -> None:
        """Put a layer into the index; LayerExists if the id is taken."""
        if self.exists(id):
            raise LayerExists(f"layer {id} exists already", id=id)
        self.parent[id] = parent
        if parent is not None:
            self.children.setdefault(parent, set()).add(id)

    def forget(self, id: LayerId) -> None:
        """Take a layer out of the index."""
        self.damaged.pop(id, None)
        above = self.parent.pop(id, None)
        if above is not None:
            self.children[above].discard(id)
            if not self.children[above]:
                del self.children[above]

    def create_on_disk(
        self,
        id: LayerId,
        parents: tuple[LayerId, ...],
        xattrs: Mapping[str, bytes],
        staged: str = "",
    ) -> None:
        """Make the layer's directories, then its parents file: all or nothing, and durable.

        The top directory carries owner, mode, times and xattrs of the parent's: it is what shows as
        `/` in the union (moby lost them: docker-aufs.md B13). `xattrs` are set on it besides.
        A subvolume from `stage_child` is taken as it is. Raises LayerExists if something lies where
        the layer would, NoSpace, or OSError.
        """
        content = self.layout.content(id)
        mount_point = self.layout.mount_point(id)
        if os.path.lexists(self.layout.parents_file(id)):
            raise LayerExists(f"layer {id} was made behind our back", id=id)
        made: list[str] = []
        try:
            for path in (content, mount_point):
                self._make_directory(path, id)
                made.append(path)
            if staged:
                if parents:
                    above = self.layout.content(parents[0])
                    contents.note_origin(staged, above, self.xattr_namespace)
                os.setxattr(staged, f"{self.xattr_namespace}.{CREATING_XATTR}", b"1")
                # onto the empty directory, which is replaced
                os.rename(staged, content)
            elif parents:
                copy_attributes(self.layout.content(parents[0]), content)
            for name, value in xattrs.items():
                os.setxattr(content, name, value)
            if self.sync != "none":
                for path in (content, self.layout.diff, self.layout.mnt):
                    fsync(path)
            self._write_parents(id, parents)
        except BaseException as error:
            for path in made:
                try:
                    os.rmdir(path)
                except OSError:
                    if staged:
                        self.discard(path)
            if isinstance(error, OSError):
                raise no_space(error, id) or error from error
            raise
        if staged:
            with contextlib.suppress(OSError):
                os.removexattr(content, f"{self.xattr_namespace}.{CREATING_XATTR}")

    def _make_directory(self, path: str, id: LayerId) -> None:
        try:
            os.mkdir(path, 0o755)
        except FileExistsError:
            try:
                os.rmdir(path)
            except OSError as error:
                raise LayerExists(
                    f"there is no layer {id}, but {path} exists and is not empty; "
                    f"`aufsctl check` says more",
                    id=id,
                ) from error
            os.mkdir(path, 0o755)
        os.chown(path, self.uid, self.gid)
        # mkdir's mode went through the umask
        os.chmod(path, 0o755)

    def _write_parents(self, id: LayerId, parents: tuple[LayerId, ...]) -> None:
        fresh = f"{self.layout.staging}/parents-{id}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        with open(os.open(fresh, flags, 0o644), "wb") as file:
            file.write("".join(f"{parent}\n" for parent in parents).encode())
            file.flush()
            if self.sync != "none":
                os.fsync(file.fileno())
        name = self.layout.parents_file(id)
        at = syscalls.AT_FDCWD
        try:
            # a parents file that is there already is somebody's layer: never replace it
            syscalls.renameat2(at, fresh, at, name, syscalls.RENAME_NOREPLACE)
        except OSError:
            os.unlink(fresh)
            raise
        if self.sync != "none":
            try:
                fsync(self.layout.layers)
            except OSError:
                os.unlink(name)
                raise

    # --- removing -----------------------------------------------------------------------------

    def remove_on_disk(self, id: LayerId) -> list[OSError]:
        """Unlink the parents file (the commit), then move what is left out of the way.

        The mark on the content comes first: with it, recovery knows an interrupted removal from
        content that somebody else put there. `erase_removed` deletes later. After the commit the
        layer is gone: what then could not be moved is returned, and recovery moves it.
        """
        with contextlib.suppress(OSError):
            if self.snapshots:
                contents.freeze(self.layout.content(id), False)
            os.setxattr(self.layout.content(id), f"{self.xattr_namespace}.{REMOVING_XATTR}", b"1")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.layout.parents_file(id))
        if self.sync != "none":
            fsync(self.layout.layers)
        failures: list[OSError] = []
        layout = self.layout
        for path in (layout.content(id), layout.mount_point(id), layout.work(id)):
            try:
                self.discard(path)
            except OSError as error:
                failures.append(error)
        return failures

    def discard(self, path: str) -> None:
        """Move a directory out of the way, to be deleted later; harmless if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, self._removing_name(os.path.basename(path)))

    def _removing_name(self, name: str) -> str:
        return f"{self.layout.removing}/{os.getpid()}.{next(self._serial)}.{name[:200]}"

    def erase_removed(self) -> list[OSError]:
        """Delete what removals left behind; what could not be deleted stays for the next time."""
        failures: list[OSError] = []
        device = os.lstat(self.layout.removing).st_dev
        for name in os.listdir(self.layout.removing):
            try:
                erase(f"{self.layout.removing}/{name}", device)
            except OSError as error:
                failures.append(error)
        return failures

    # --- content ------------------------------------------------------------------------------

    def stage(self, id: LayerId, xattrs: Mapping[str, bytes]) -> str:
        """An empty directory in staging with the attributes of the layer's own; its path.

        A subvolume comes with what it holds, and with its limit.
        """
        with self._staged() as path:
            if self.snapshots:
                contents.snapshot(self.layout.content(id), path)
                size = contents.limit_of(path, self.xattr_namespace)
                contents.limit(path, size, self.xattr_namespace)
            else:
                os.mkdir(path, 0o700)
                copy_attributes(self.layout.content(id), path)
            for name, value in xattrs.items():
                os.setxattr(path, name, value)
        return path

    def stage_child(self, parent: LayerId | None, size: int) -> str:
        """A subvolume in staging for a new layer, with what its parent holds; its path.

        `size`: at most so many bytes, 0 for no limit. Raises OSError.
        """
        with self._staged() as path:
            if parent is None:
                contents.make_subvolume(path)
                os.chown(path, self.uid, self.gid)
            else:
                contents.snapshot(self.layout.content(parent), path)
            contents.limit(path, size, self.xattr_namespace)
        return path

    @contextlib.contextmanager
    def _staged(self) -> Iterator[str]:
        path = f"{self.layout.staging}/{os.getpid()}.{next(self._serial)}"
        try:
            yield path
        except BaseException:
            self.discard(path)
            raise

    def swap_in(self, id: LayerId, staged: str) -> None:
        """Put staged content in the layer's place with one rename; the old content is discarded.

        The content was synced by who wrote it; here the names are (renameat2(2),
        RENAME_EXCHANGE: both names exist at every moment).
        """
        content = self.layout.content(id)
        at = syscalls.AT_FDCWD
        if self.snapshots:
            contents.freeze(content, False)
        syscalls.renameat2(at, staged, at, content, syscalls.RENAME_EXCHANGE)
        if self.sync != "none":
            fsync(self.layout.diff)
        self.discard(staged)

    # --- the store as a whole -----------------------------------------------------------------

    def set_backend(self, name: str, *, snapshots: bool = False) -> None:
        """Record which backend serves the store, for the next start's choice."""
        self.snapshots = snapshots
        if self.format.backend != name:
            self.format.backend = name
            write_format(self.layout, self.format, self.sync)

    def close(self) -> None:
        """Release the lock."""
        os.close(self.lock_fd)


def open_store(
    root: str,
    *,
    adopt: bool,
    sync: Sync = "filesystem",
    uid: int = 0,
    gid: int = 0,
    xattr_namespace: XattrNamespace = "trusted",
) -> Store:
    """Lock the store at `root` (absolute, resolved, existing) and read its index.

    Makes a store where the directory is empty. Raises StoreLocked if a process has it open, and
    StoreNotAdopted if it holds layers that aufsd did not make and `adopt` is false; then nothing
    was changed. Recovery is a step of its own: `recovery.recover`.
    """
    layout = Layout(root)
    known = read_format(layout)
    foreign = known is None and _has_layers(layout)
    if foreign and not adopt:
        raise StoreNotAdopted(
            f"{root} holds layers that aufsd did not make; start once with --adopt to serve them",
            root=root,
        )
    os.makedirs(layout.private, 0o700, exist_ok=True)
    lock_fd = _lock(layout)
    try:
        for path in (root, layout.layers, layout.diff, layout.mnt):
            os.makedirs(path, _MODE, exist_ok=True)
            os.chown(path, 0, gid)
            os.chmod(path, _MODE)
        for path in (
            layout.staging,
            layout.removing,
            layout.quarantine,
            layout.probes,
            f"{layout.private}/work",
        ):
            os.makedirs(path, 0o700, exist_ok=True)
        store = Store(
            layout, sync, uid, gid, known or Format(adopted=foreign), xattr_namespace, lock_fd
        )
        if known is None:
            write_format(layout, store.format, sync)
        parent, damaged = read_index(layout.layers)
        store.damaged.update(damaged)
        for id, above in parent.items():
            store.register(id, above)
    except BaseException:
        os.close(lock_fd)
        raise
    return store


def _has_layers(layout: Layout) -> bool:
    for path in (layout.layers, layout.diff):
        with contextlib.suppress(FileNotFoundError):
            if os.listdir(path):
                return True
    return False


def _lock(layout: Layout) -> int:
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise StoreLocked(
            f"another process serves {layout.root}; `fuser {layout.lock}` says which",
            root=layout.root,
        ) from error
    return fd


def read_format(layout: Layout) -> Format | None:
    """`.aufsd/format`, or None where aufsd has never served this root."""
    try:
        with open(layout.format, "rb") as file:
            return msgspec.json.decode(file.read(), type=Format)
    except FileNotFoundError:
        return None


def write_format(layout: Layout, content: Format, sync: Sync) -> None:
    """Replace `.aufsd/format` atomically."""
    fresh = f"{layout.format}.new"
    with open(fresh, "wb") as file:
        file.write(msgspec.json.encode(content) + b"\n")
        file.flush()
        if sync != "none":
            os.fsync(file.fileno())
    os.rename(fresh, layout.format)
    if sync != "none":
        fsync(layout.private)


def no_space(error: OSError, id: LayerId) -> NoSpace | None:
    """The API's error for a full file system or quota."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"no space left for layer {id}: {error.strerror}", id=id)
    return None
