"""Reads a store that no daemon serves: in this process, without a job or a mount.

Nothing is written below the store's root, and read permission is enough, with one exception. The
marks of overlayfs are trusted.* xattrs, which only CAP_SYS_ADMIN can see; without them deleted
files would appear again. So without CAP_SYS_ADMIN only a store that aufsd has never served is read,
because its marks are all aufs's.
"""

import fcntl
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from aufsd.archive import compare, fingerprint, measure, readings, view
from aufsd.archive.meter import Meter
from aufsd.archive.pack import Packer, pack
from aufsd.archive.requests import Branch, Settings
from aufsd.archive.sink import Sink
from aufsd.kernel import probe, syscalls
from aufsd.results import Problem
from aufsd.store import dialect as dialects
from aufsd.store import records
from aufsd.store.dialect import Dialect, UnknownMark
from aufsd.store.identity import require_directory
from aufsd.store.ids import LayerId, parse_id
from aufsd.store.index import read_parents
from aufsd.store.layout import Layout
from aufsd.store.opened import damaged
from aufsd_client.errors import LayerDamaged, LayerNotFound, PermissionDenied, StoreLocked


@dataclass(frozen=True, slots=True)
class Offline:
    """A store, open for reading; `diff` is the directory that the branches lie in."""

    layout: Layout
    settings: Settings
    diff: int

    def chain(self, id: str) -> tuple[Branch, ...]:
        """The layer and its parents, nearest first. Raises LayerNotFound, LayerDamaged."""
        ids = (parse_id(id), *self._parents(LayerId(id)))
        for index, one in enumerate(ids[1:], 1):
            try:
                sound = self._parents(one) == ids[index + 1 :]
            except (LayerNotFound, LayerDamaged) as error:
                raise LayerDamaged(f"below layer {id}: {error.message}", id=id) from None
            if not sound:
                problem = f"its parents file does not continue as that of its parent {one}"
                raise LayerDamaged(f"layer {id}: {problem}", id=id, problem=problem)
        return tuple(Branch(one, self._dialect(one)) for one in ids)

    def _parents(self, id: LayerId) -> tuple[LayerId, ...]:
        try:
            parents = read_parents(self.layout.parents_file(id))
        except FileNotFoundError:
            raise LayerNotFound(f"there is no layer {id}", id=id) from None
        if isinstance(parents, str):
            raise LayerDamaged(f"layer {id}: {parents}", id=id, problem=parents)
        return tuple(LayerId(parent) for parent in parents)

    def _dialect(self, id: LayerId) -> Dialect:
        path = self.layout.content(id)
        require_directory(path, id)
        try:
            return dialects.read_dialect(path, self.settings.namespace)
        except UnknownMark as error:
            raise damaged(id, error.strerror) from error

    def write_view(self, id: str, out: int) -> list[str]:
        """Write the merged view of a layer as a tar to the descriptor `out`; warnings."""
        return self._compare(self.chain(id), (), out)

    def _compare(self, now: Sequence[Branch], then: Sequence[Branch], out: int) -> list[str]:
        meter = Meter(_unheard)
        packer = Packer(Sink(out, meter, digest=False), self.settings, meter)
        namespace = self.settings.namespace
        roots = (
            view.roots(self.diff, now, namespace, beside=len(then)),
            view.roots(self.diff, then, namespace, beside=len(now)),
        )
        compare.pack(packer, *roots, self.settings)
        return meter.warnings()

    def write_layer(self, id: str, out: int) -> list[str]:
        """Write what a layer changed as a tar to the descriptor `out`; warnings."""
        chain = self.chain(id)
        if chain[0].dialect is Dialect.NONE:
            return self._compare(chain, chain[1:], out)
        return write_branch(self.diff, chain[0], self.settings, out)

    def look_into(self, ids: Sequence[str]) -> list[Problem]:
        """What is wrong with the marks of the layers; a damaged one is told elsewhere."""
        found: list[Problem] = []
        for id in ids:
            try:
                chain = self.chain(id)
                with _standing_in(self.diff, chain[0], self.settings):
                    found += readings.look_into(self.diff, chain, self.settings.namespace)
            except LayerDamaged:
                continue
            except OSError as error:
                content = self.layout.content(LayerId(id))
                found.append(Problem(id, "unreadable", f"{content}: {error.strerror}", False))
        return found

    def compare(self, ids: Sequence[str]) -> list[Problem]:
        """Which of the layers are not what their archives made of them, or cannot be read."""
        found = []
        for id in ids:
            content = self.layout.content(LayerId(id))
            recorded = records.read(content, self.settings.namespace)
            if recorded:
                try:
                    problem = fingerprint.problem(id, recorded, self._fingerprint(id))
                except OSError as error:
                    where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
                    problem = Problem(
                        id, "unreadable", f"{content}: {error.strerror}{where}", False
                    )
                except LayerDamaged as error:
                    problem = Problem(id, "unreadable", error.message, False)
                found += [problem] if problem else []
        return found

    def _fingerprint(self, id: str) -> str:
        with _standing_in(
            self.diff, Branch(id, self._dialect(LayerId(id))), self.settings
        ) as layer:
            return fingerprint.fingerprint(layer, self.settings, Meter(_unheard))


@contextmanager
def _standing_in(diff: int, branch: Branch, settings: Settings) -> Iterator[view.Layer]:
    """A branch, with its root the current directory; where we were before at the end."""
    place = view.root(diff, branch, settings.namespace)
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fchdir(place.fd)
        yield place.layer
    finally:
        os.fchdir(before)
        os.close(before)
        place.close()


def write_branch(diff: int, branch: Branch, settings: Settings, out: int) -> list[str]:
    """Write a branch's own content as a tar to the descriptor `out`; warnings.

    `diff` is the directory that the branch lies in.
    """
    meter = Meter(_unheard)
    with _standing_in(diff, branch, settings) as layer:
        pack(Packer(Sink(out, meter, digest=False), settings, meter), layer)
    return meter.warnings()


def measure_branch(diff: int, branch: Branch, settings: Settings) -> int:
    """Bytes of a branch's own regular files, each inode once."""
    with _standing_in(diff, branch, settings):
        return measure.measure(aufs=branch.dialect is Dialect.AUFS).bytes


@contextmanager
def open_offline(root: str, settings: Settings) -> Iterator[Offline]:
    """The store at `root` (resolved), which no daemon can begin to serve until the block is left.

    Raises StoreLocked if one does, PermissionDenied, OSError. Raises this process's limit of open
    files: a merged directory takes one for each of its branches, on each level of the tree.
    """
    layout = Layout(root)
    lock = _share(layout)
    try:
        if os.path.lexists(layout.private) and not _sees_marks(layout, settings.namespace):
            raise PermissionDenied(
                f"{root} may hold overlayfs's marks of deleted files, which only a process with "
                "CAP_SYS_ADMIN can read: run this as root"
            )
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        diff = os.open(layout.diff, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield Offline(layout, settings, diff)
        finally:
            os.close(diff)
    finally:
        if lock is not None:
            os.close(lock)


def _share(layout: Layout) -> int | None:
    """Hold the store's lock with others that read; None where it has none that we may open."""
    try:
        fd = os.open(layout.lock, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StoreLocked(
            f"a daemon serves {layout.root}, so ask it: `aufsctl` has the same command",
            root=layout.root,
        ) from None
    return fd


def _sees_marks(layout: Layout, namespace: str) -> bool:
    if namespace == "user":
        # a store that root of the host served shows as somebody else's in a user namespace
        return os.stat(layout.private).st_uid == 0
    return probe.has_capability(syscalls.CAP_SYS_ADMIN)


def _unheard(size: int, entries: int) -> None:
    """Nobody watches the progress."""
