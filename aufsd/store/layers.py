"""Layers on disk: create, parents, children, remove, and swapping content in.

`layers/<id>` is a layer's commit point: the layer exists when that file does. It lists the parents,
nearest first, one a line, as Docker's driver writes it. The whole index (who stands on whom) is
read once, when the store is opened; after that no operation looks at more than its own layer.

Synchronous. One `Store` belongs to one daemon, which calls the `_on_disk` halves from a thread and
keeps two of them from touching one id at the same time.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from aufsd.kernel import syscalls
from aufsd.kernel.beneath import DIRECTORY
from aufsd.store import content as contents
from aufsd.store import records
from aufsd.store.content import copy_attributes, fsync
from aufsd.store.dialect import (
    Dialect,
    XattrNamespace,
    is_settled,
    mark_settled,
)
from aufsd.store.erase import Left, erase
from aufsd.store.format import Format, Sync, write_durably, write_format
from aufsd.store.identity import Identity, require_directory
from aufsd.store.ids import LayerId
from aufsd.store.index import parent_mark
from aufsd.store.layout import Layout
from aufsd.store.opened import content_of, dialect_of
from aufsd.store.space import no_space
from aufsd_client.errors import LayerDamaged, LayerExists, LayerNotFound, MountFailed


@dataclass(slots=True)
class Store:
    """An open store: its locks, and the index of its layers.

    `parent` has None for a base layer. `damaged` are layers whose record on disk cannot be trusted;
    they are not in `parent`. Owns the descriptors of the locks until `close`; `jobs_fd` is for the
    processes of archive jobs to inherit. `resumed`: action, what and id (recovery.py tells it).
    """

    layout: Layout
    sync: Sync
    uid: int
    gid: int
    format: Format
    xattr_namespace: XattrNamespace
    lock_fd: int
    jobs_fd: int
    identity: Identity
    parent: dict[LayerId, LayerId | None] = field(default_factory=dict)
    children: dict[LayerId, set[LayerId]] = field(default_factory=dict)
    damaged: dict[LayerId, str] = field(default_factory=dict)
    # when each was made, in seconds since the epoch: the time of its parents file
    created: dict[LayerId, float] = field(default_factory=dict)
    # those whose content changes no more (seals.py)
    sealed: set[LayerId] = field(default_factory=set)
    # nothing is recorded of them, as far as it is known
    unrecorded: set[LayerId] = field(default_factory=set)
    resumed: Sequence[tuple[str, str, str]] = ()
    # removed ones whose content could not be deleted
    undeleted: int = 0
    # below the store's private directory, and could not be moved away when their time was over
    _left: list[str] = field(default_factory=list)
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
        found = []
        above: LayerId | None = id
        try:
            while above is not None:
                found.append(above)
                above = self.parent[above]
        except KeyError:
            self.require(found[-1])
            raise
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
        above = self.parent.pop(id, None)
        self.created.pop(id, None)
        self.sealed.discard(id)
        self.unrecorded.discard(id)
        if self.damaged.pop(id, None) is not None:
            above = next((other for other, made in self.children.items() if id in made), None)
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
        self.identity.verify()
        content = self.layout.content(id)
        mount_point = self.layout.mount_point(id)
        if os.path.lexists(self.layout.parents_file(id)):
            raise LayerExists(f"layer {id} was made behind our back", id=id)
        if os.path.lexists(self.layout.removal(id)):
            self.finish_removal(id)
        fresh = self.layout.creation(id)
        made: list[str] = []
        try:
            for path in (content, mount_point):
                self._make_directory(path, id)
                made.append(path)
            # says from here on that what lies there is a layer that is being made
            write_durably(fresh, "".join(f"{parent}\n" for parent in parents), self.sync)
            if staged:
                if parents:
                    above = self.layout.content(parents[0])
                    contents.note_origin(staged, above, self.xattr_namespace)
                # onto the empty directory, which is replaced
                os.rename(staged, content)
            elif parents:
                copy_attributes(self.layout.content(parents[0]), content)
            self._mark(content, parents[0] if parents else None, xattrs)
            if self.sync != "none":
                for path in (content, self.layout.diff, self.layout.mnt):
                    fsync(path)
            self.created[id] = os.lstat(fresh).st_mtime
            self._commit(id, fresh)
        except BaseException as error:
            # a parents file that could not be taken back means a layer that is wholly there
            whole = os.path.lexists(self.layout.parents_file(id))
            for path in () if whole else made:
                try:
                    os.rmdir(path)
                except OSError:
                    if staged:
                        self.discard_staged(path)
            if whole or not any(map(os.path.lexists, made)):
                with contextlib.suppress(OSError):
                    os.unlink(fresh)
            if isinstance(error, OSError):
                raise no_space(error, id) or error from error
            raise

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

    def _commit(self, id: LayerId, fresh: str) -> None:
        """Make the file `fresh` a layer's parents file, durably; undone if it raises OSError."""
        name, at = self.layout.parents_file(id), syscalls.AT_FDCWD
        # one that is there already is somebody's layer: never replace it
        syscalls.renameat2(at, fresh, at, name, syscalls.RENAME_NOREPLACE)
        if self.sync != "none":
            try:
                fsync(self.layout.layers)
            except OSError:
                os.rename(name, fresh)
                raise

    # --- removing -----------------------------------------------------------------------------

    def remove_on_disk(self, id: LayerId) -> list[OSError]:
        """Move the parents file to `.aufsd/removing` (the commit), then the rest after it.

        There it says that what is left of the layer is ours to take away, and not content that
        somebody else put into the store. Raises OSError, with nothing done, until the commit; what
        could not be moved after it is returned, and `finish_removal` or recovery moves it.
        `erase_removed` deletes later.
        """
        self.identity.verify()
        layout = self.layout
        record, name = layout.removal(id), layout.parents_file(id)
        try:
            os.rename(name, record)
        except FileNotFoundError:
            # taken away behind our back: content and mount point are still to go
            with open(record, "wb"):
                pass
        else:
            if self.sync != "none":
                try:
                    fsync(layout.layers)
                except OSError:
                    os.rename(record, name)
                    raise
        return self.finish_removal(id)

    def finish_removal(self, id: LayerId) -> list[OSError]:
        """Move what is left of a layer whose removal was committed; what could not be moved."""
        failures: list[OSError] = []
        layout = self.layout
        with contextlib.suppress(OSError):
            contents.thaw(layout.content(id))
        for path in (layout.content(id), layout.mount_point(id), layout.work(id)):
            try:
                self.discard(path)
            except OSError as error:
                failures.append(error)
        if not failures:
            try:
                os.unlink(layout.removal(id))
            except FileNotFoundError:
                pass  # the removal of which this was left has come to its end
            except OSError as error:
                failures.append(error)
        return failures

    def half_removed(self) -> list[LayerId]:
        """Layers whose removal was committed, of which something is left all the same."""
        return self.layout.marked(os.listdir(self.layout.removing))

    def discard(self, path: str) -> None:
        """Move a directory out of the way, to be deleted later; harmless if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, self._removing_name(os.path.basename(path)))

    def discard_staged(self, path: str) -> None:
        """The same for one in staging; what cannot be moved is tried again by `erase_removed`."""
        try:
            self.discard(path)
        except OSError:
            self._left.append(path)

    def _removing_name(self, name: str) -> str:
        return f"{self.layout.removing}/{os.getpid()}.{next(self._serial)}.{name[:200]}"

    def erase_removed(self) -> dict[str, Left]:
        """Delete what removals left behind; what could not be, by its name in `removing`."""
        left, self._left = self._left, []
        for path in left:
            self.discard_staged(path)
        directory = self.layout.removing
        found: dict[str, Left] = {}
        try:
            removing = os.open(directory, DIRECTORY)
        except OSError as error:
            return {"": Left.of(error, directory)}
        try:
            for name in sorted(self._removed(removing)):
                one = erase(removing, os.fsencode(name), f"{directory}/{name}")
                if one is not None:
                    found[name] = one
        except OSError as error:
            found[""] = Left.of(error, directory)
        finally:
            os.close(removing)
        return found

    def _removed(self, removing: int) -> set[str]:
        """What waits in there; the parents files of layers that are being removed do not."""
        names = os.listdir(removing)
        half = {os.path.basename(self.layout.removal(id)) for id in self.layout.marked(names)}
        return set(names) - half

    # --- content ------------------------------------------------------------------------------

    def stage(self, id: LayerId, xattrs: Mapping[str, bytes]) -> str:
        """An empty directory in staging with the attributes of the layer's own; its path.

        Raises OSError, and leaves none.
        """
        with self._staged() as path:
            os.mkdir(path, 0o700)
            copy_attributes(self.layout.content(id), path)
            self._mark(path, self.parent[id], xattrs)
        return path

    def stage_snapshot(self, id: LayerId, xattrs: Mapping[str, bytes]) -> str:
        """A snapshot of the layer's subvolume in staging, with its limit; its path.

        Raises OSError, and leaves none.
        """
        with self._staged() as path:
            contents.snapshot(self.layout.content(id), path)
            size = contents.limit_of(path, self.xattr_namespace)
            contents.limit(path, size, self.xattr_namespace)
            self._mark(path, self.parent[id], xattrs)
        return path

    def _mark(self, path: str, parent: LayerId | None, xattrs: Mapping[str, bytes]) -> None:
        marks = parent_mark(parent, self.xattr_namespace)
        for name, value in {**xattrs, **marks}.items():
            os.setxattr(path, name, value)

    def stage_child(self, parent: LayerId | None, size: int, content: str = "") -> str:
        """A subvolume in staging for a new layer, with what its parent holds; its path.

        `size`: at most so many bytes, 0 for no limit. `content`: where to take it from, if not from
        the parent itself. Raises OSError; then there is none.
        """
        with self._staged() as path:
            if parent is None:
                contents.make_subvolume(path)
                os.chown(path, self.uid, self.gid)
            else:
                contents.snapshot(content or self.layout.content(parent), path)
            contents.limit(path, size, self.xattr_namespace)
        return path

    @contextlib.contextmanager
    def _staged(self) -> Iterator[str]:
        self.identity.verify()
        path = f"{self.layout.staging}/{os.getpid()}.{next(self._serial)}"
        try:
            yield path
        except BaseException:
            self.discard_staged(path)
            raise

    def swap_in(
        self, id: LayerId, staged: str, fingerprint: str = "", *, settled: bool = False
    ) -> None:
        """Put staged content in the layer's place with one rename; the old content is discarded.

        `fingerprint` is recorded of it, "" for nothing; `settled`: see dialect.mark_settled.
        The content was synced by who wrote it; here the names are (renameat2(2),
        RENAME_EXCHANGE: both names exist at every moment). Raises OSError, with nothing done.
        """
        self.identity.verify()
        content = self.layout.content(id)
        require_directory(content, id)
        at = syscalls.AT_FDCWD
        contents.thaw(content)
        records.write(staged, fingerprint, self.xattr_namespace)
        if settled:
            mark_settled(staged, self.xattr_namespace)
        syscalls.renameat2(at, staged, at, content, syscalls.RENAME_EXCHANGE)
        if self.sync != "none":
            try:
                fsync(self.layout.diff)
                if fingerprint:
                    fsync(content)
            except OSError:
                syscalls.renameat2(at, staged, at, content, syscalls.RENAME_EXCHANGE)
                raise
        self.discard_staged(staged)
        self.unrecorded.discard(id)

    def dialect(self, id: LayerId) -> Dialect:
        """How the layer's content says what is deleted. LayerDamaged without any."""
        return dialect_of(self.identity, id, self.xattr_namespace)

    def settled_on(self, id: LayerId) -> list[LayerId]:
        """Layers on this one that lack whiteouts which, by what it held, hide nothing."""
        found = []
        pending = list(self.children_of(id))
        while pending:
            above = pending.pop()
            pending += self.children_of(above)
            with contextlib.suppress(OSError, LayerDamaged), content_of(self.identity, above) as fd:
                if is_settled(fd, self.xattr_namespace):
                    found.append(above)
        return sorted(found)

    def recorded(self, id: LayerId) -> str:
        """What an apply recorded of the layer's content; "" for nothing. LayerDamaged."""
        with content_of(self.identity, id) as fd:
            return records.read(fd, self.xattr_namespace)

    def unrecord(self, id: LayerId) -> None:
        """Before somebody may write into a layer: what is recorded of it is dropped, durably.

        Raises LayerDamaged, MountFailed, and then the layer must not be given out.
        """
        if id in self.unrecorded:
            return
        self.identity.verify()
        try:
            with content_of(self.identity, id) as fd:
                records.drop(fd, self.xattr_namespace, self.sync)
        except OSError as error:
            raise MountFailed(
                f"layer {id} cannot be made ready for being written to: {error.strerror}",
                id=id,
                errno=errno.errorcode.get(error.errno or 0, "EIO"),
            ) from error
        self.unrecorded.add(id)

    # --- the store as a whole -----------------------------------------------------------------

    def set_backend(self, name: str) -> None:
        """Record which backend serves the store, for the next start's choice."""
        if self.format.backend != name:
            self.format.backend = name
            write_format(self.layout, self.format, self.sync)

    def close(self) -> None:
        """Release the locks."""
        self.identity.close()
        os.close(self.jobs_fd)
        os.close(self.lock_fd)
