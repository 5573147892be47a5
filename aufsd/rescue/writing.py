"""Layers as tars and images into an OCI layout or an archive that `docker load` takes."""

import hashlib
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from aufsd.archive import offline
from aufsd.archive.requests import Branch, Settings
from aufsd.kernel import probe, syscalls
from aufsd.rescue import tar_split
from aufsd.rescue.data_root import DataRoot, digest
from aufsd.rescue.images import Source, Wanted, compact
from aufsd.rescue.refused import Refused
from aufsd.store import dialect
from aufsd.store.dialect import Dialect
from aufsd_client import oci

_STEP = 1 << 20
# mtime of what is in an archive but no file of an image
_EPOCH = 0
# damaged files of a layer that are named
_NAMED = 20


@dataclass(frozen=True, slots=True)
class Content:
    """The layers of a data root, open for reading; `store` is what all of them lie below."""

    root: DataRoot
    settings: Settings
    store: int

    def write(self, source: Source, out: IO[bytes]) -> tuple[str, list[str]]:
        """Write a layer's tar at the end of `out`; its digest, and what is to be said of it.

        That of an image's layer is the original, byte by byte. If the files do not give it any more
        it is written anew, with another digest, and said why. Raises Refused, OSError.
        """
        notes: list[str] = []
        if source.chain:
            start = out.tell()
            with self._opened(source) as content:
                notes = self._original(source, content, out)
            if not notes:
                return source.diff, []
            out.seek(start)
            out.truncate()
            said, unsaid = notes[:_NAMED], len(notes) - _NAMED
            notes = [f"layer {source.diff} is written anew: {note}" for note in said]
            if unsaid > 0:
                notes.append(f"and {unsaid} more of that layer")
        found, warnings = self._anew(source, out)
        return found, [*notes, *warnings]

    def _original(self, source: Source, content: int, out: IO[bytes]) -> list[str]:
        """Write the original tar; why that is not it, if it is not."""
        split = self.root.tar_split(source.chain)
        try:
            made = tar_split.assemble(split, content, out)
            if made.damaged:
                return list(made.damaged)
            if made.digest != source.diff:
                changed = list(tar_split.differences(split, content))
                return changed or ["its files and the record of its tar do not fit its digest"]
        except tar_split.Unusable as error:
            return [str(error)]
        return []

    def _anew(self, source: Source, out: IO[bytes]) -> tuple[str, list[str]]:
        start = out.tell()
        out.flush()
        warnings = offline.write_branch(
            self.store, self._branch(source), self.settings, out.fileno()
        )
        out.seek(start)
        hashed = hashlib.sha256()
        while data := out.read(_STEP):
            hashed.update(data)
        return f"sha256:{hashed.hexdigest()}", warnings

    def own_size(self, cache: str) -> int:
        """Bytes of the regular files that a layer holds of its own. Raises Refused, OSError."""
        return offline.measure_branch(self.store, self._branch(Source(cache)), self.settings)

    def _branch(self, source: Source) -> Branch:
        content = self.root.content(source.cache)
        if not content.is_dir():
            raise Refused(f"its content is gone: {content} does not exist")
        below = content.relative_to(self.root.path / self.root.driver)
        if self.root.driver == "aufs":
            # aufsd may have served the store since, over another union file system
            return Branch(str(below), dialect.read_dialect(content, self.settings.namespace))
        if not probe.has_capability(syscalls.CAP_SYS_ADMIN):
            raise Refused("the marks of deleted files show only to root: run this as root")
        return Branch(str(below), Dialect.OVERLAY)

    @contextmanager
    def _opened(self, source: Source) -> Iterator[int]:
        try:
            fd = os.open(
                self.root.content(source.cache),
                os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
            )
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Refused(f"its layer {source.diff} is gone: {error.filename}") from None
        try:
            yield fd
        finally:
            os.close(fd)


@contextmanager
def open_content(root: DataRoot, settings: Settings) -> Iterator[Content]:
    """The layers of a data root. Raises StoreLocked if aufsd serves them, PermissionDenied."""
    if root.driver == "aufs":
        with offline.open_offline(str(root.path / "aufs"), settings):
            yield from _content(root, settings)
    else:
        yield from _content(root, settings)


def _content(root: DataRoot, settings: Settings) -> Iterator[Content]:
    store = os.open(root.path / root.driver, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Content(root, settings, store)
    finally:
        os.close(store)


@dataclass(frozen=True, slots=True)
class Written:
    """An image that was written; `id` is its configuration's digest."""

    what: str
    id: str
    names: tuple[str, ...]
    notes: tuple[str, ...]


class Target(Protocol):
    """Where images go. What was added is there from `commit` on."""

    def layer(self, write: Callable[[IO[bytes]], str]) -> str:
        """Add a layer that `write` writes to a file; its digest."""

    def image(self, names: Sequence[str], config: bytes, diff_ids: Sequence[str]) -> None:
        """Add an image of layers that were added."""

    def commit(self) -> None:
        """Put all that was added in its place."""


def write(content: Content, wanted: Sequence[Wanted], target: Target) -> Iterator[Written | str]:
    """Add images to a target, each as it is asked for; a sentence for one that cannot be written.

    A layer that several images stand on is written once.
    """
    done: dict[Source, tuple[str, list[str]]] = {}
    for one in wanted:
        notes: list[str] = []
        try:
            for source in one.layers:
                if source not in done:
                    done[source] = _layer(content, source, target)
                notes += done[source][1]
        except Refused as refused:
            yield f"{one.what}: {refused}"
            continue
        except OSError as error:
            yield f"{one.what}: {error.filename or ''}: {error.strerror}"
            continue
        diff_ids = [done[source][0] for source in one.layers]
        config = one.configured(diff_ids)
        target.image(one.names, config, diff_ids)
        yield Written(one.what, digest(config), one.names, tuple(notes))


def _layer(content: Content, source: Source, target: Target) -> tuple[str, list[str]]:
    notes: list[str] = []

    def write(file: IO[bytes]) -> str:
        found, said = content.write(source, file)
        notes.extend(said)
        return found

    return target.layer(write), notes


@dataclass(slots=True)
class OciLayout:
    """Images into an OCI image layout; one without a name is under its id."""

    layout: oci.Layout
    _layers: dict[str, oci.Layer]

    def layer(self, write: Callable[[IO[bytes]], str]) -> str:
        """See Target."""
        added = self.layout.add_layer(write)
        self._layers[added.diff_id] = added
        return added.diff_id

    def image(self, names: Sequence[str], config: bytes, diff_ids: Sequence[str]) -> None:
        """See Target."""
        for name in names or [digest(config).removeprefix("sha256:")]:
            self.layout.add_image(name, config, [self._layers[diff_id] for diff_id in diff_ids])

    def commit(self) -> None:
        """See Target."""
        self.layout.commit()


def oci_layout(directory: str, *, compress: bool) -> OciLayout:
    """The layout at `directory`, made if there is none. Raises oci.LayoutError, OSError."""
    return OciLayout(oci.open_layout(directory, compress=compress), {})


@dataclass(slots=True)
class DockerArchive:
    """Images into one file as `docker save` writes it: a tar of layers' tars, and manifest.json."""

    path: Path
    file: IO[bytes]
    _manifest: list[dict[str, Any]]
    _within: set[str]

    def layer(self, write: Callable[[IO[bytes]], str]) -> str:
        """See Target."""
        header = self.file.tell()
        self.file.write(bytes(tarfile.BLOCKSIZE))
        start = self.file.tell()
        name = ""
        try:
            diff_id = write(self.file)
            name = _layer_name(diff_id)
        finally:
            # one that is in here already, or that could not be written, leaves no hole
            if not name or name in self._within:
                self.file.seek(header)
                self.file.truncate()
        if name in self._within:
            return diff_id
        self.file.seek(0, os.SEEK_END)
        size = self.file.tell() - start
        self.file.write(bytes(-size % tarfile.BLOCKSIZE))
        self.file.seek(header)
        self.file.write(_header(name, size))
        self.file.seek(0, os.SEEK_END)
        self._within.add(name)
        return diff_id

    def image(self, names: Sequence[str], config: bytes, diff_ids: Sequence[str]) -> None:
        """See Target."""
        name = f"{digest(config).removeprefix('sha256:')}.json"
        if name not in self._within:
            self._add(name, config)
            self._within.add(name)
        self._manifest.append(
            {
                "Config": name,
                "RepoTags": list(names) or None,
                "Layers": [_layer_name(diff_id) for diff_id in diff_ids],
            }
        )

    def _add(self, name: str, data: bytes) -> None:
        self.file.write(_header(name, len(data)))
        self.file.write(data)
        self.file.write(bytes(-len(data) % tarfile.BLOCKSIZE))

    def commit(self) -> None:
        """See Target."""
        self._add("manifest.json", compact(self._manifest))
        self.file.write(bytes(2 * tarfile.BLOCKSIZE))
        self.file.flush()
        os.fchmod(self.file.fileno(), 0o644)
        os.rename(self.file.name, self.path)


@contextmanager
def docker_archive(path: str) -> Iterator[DockerArchive]:
    """An archive that takes the place of `path` when it is committed, and else leaves nothing."""
    target = Path(path)
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115
        dir=target.parent, prefix=f".{target.name}.", delete=False
    )
    try:
        yield DockerArchive(target, file, [], set())
    finally:
        file.close()
        with suppress(FileNotFoundError):
            os.unlink(file.name)


def _layer_name(diff_id: str) -> str:
    return f"{diff_id.removeprefix('sha256:')}/layer.tar"


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, _EPOCH, 0o644
    # GNU's numbers: a layer of more than 8 GiB is still one header
    return info.tobuf(tarfile.GNU_FORMAT)
