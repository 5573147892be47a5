"""The files of an image, in a directory or inside of a tar, by name or by digest.

One in a tar is read where it lies; only a tar that is compressed as a whole is unpacked, into a
file without a name. Standard library only.
"""

import gzip
import os
import re
import shutil
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from aufsd_client.said import Said

# what an index, a manifest or a configuration may come to; registries take 4 MiB
_LARGEST = 32 << 20
# what the first name in an image's tar is, and that of a root file system never
_FIRST = re.compile(
    r"(\./)?(blobs|oci-layout|index\.json|manifest\.json|repositories"
    r"|[0-9a-f]{64}(\.json|\.tar)?)(/.*)?"
)
_LINKS = 8
_GZIP = b"\x1f\x8b"


class ImageError(Said):
    """What is wrong with an image, as a sentence."""


class BlobMissing(ImageError):
    """A blob that the image names is not there."""


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes in a file: all of it, or `size` from `offset` on."""

    file: str | IO[bytes]
    size: int
    offset: int = 0

    def read(self) -> bytes:
        """All of it. Raises ImageError if it is larger than any description is; OSError."""
        if self.size > _LARGEST:
            raise ImageError(f"a description of {self.size} bytes is none of an image")
        with self._opened() as fd:
            return os.pread(fd, self.size, self.offset)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """A descriptor to read it from, to its end."""
        with self._opened() as fd:
            if isinstance(self.file, str):
                yield fd
                return
            reader, writer = os.pipe()
            thread = threading.Thread(target=_copy, args=(fd, writer, self.offset, self.size))
            thread.start()
            try:
                yield reader
            finally:
                # who copies is told by this that nobody reads any more
                os.close(reader)
                thread.join()

    @contextmanager
    def _opened(self) -> Iterator[int]:
        if isinstance(self.file, str):
            with open(self.file, "rb", buffering=0) as file:
                yield file.fileno()
        else:
            yield self.file.fileno()


def _copy(source: int, writer: int, offset: int, size: int) -> None:
    try:
        while size:
            moved = os.sendfile(writer, source, offset, size)
            if not moved:
                # the tar is shorter than it says: who reads finds the end too early
                break
            offset += moved
            size -= moved
    except OSError:
        pass  # nobody reads any more, or it cannot be read: the reader finds the end too early
    finally:
        os.close(writer)


class Files:
    """The files of an image by name."""

    def __init__(self, source: str, members: dict[str, Blob] | None) -> None:
        self._source = source
        # None: of a directory
        self._members = members

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        if self._members is not None:
            return name in self._members
        return os.path.isfile(f"{self._source}/{name}")

    def at(self, name: str) -> Blob:
        """The file of this name. Raises BlobMissing."""
        if self._members is not None:
            found = self._members.get(os.path.normpath(name))
        else:
            found = self._file(name)
        if found is None:
            raise BlobMissing(f"{name[:200]} is missing in {self._source}")
        return found

    def _file(self, name: str) -> Blob | None:
        path = f"{self._source}/{name}"
        # a name of the image's own: nothing outside of it is read
        if ".." in name.split("/") or name.startswith("/") or not os.path.isfile(path):
            return None
        return Blob(path, os.path.getsize(path))

    def read(self, name: str) -> bytes:
        """What is in a small file."""
        return self.at(name).read()

    def blob(self, digest: str) -> Blob:
        """The blob of a digest: in blobs/, or in skopeo's `dir:` by its hex digits alone."""
        kind, _, digits = digest.partition(":")
        for name in (f"blobs/{kind}/{digits}", digits):
            if self.has(name):
                return self.at(name)
        raise BlobMissing(f"the blob {digest} is missing in {self._source}")


def is_image_archive(path: str) -> bool:
    """Whether a tar, compressed or not, is of an image; by its first name. Raises ImageError."""
    with _tar(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|") as tar:
                first = tar.next()
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            # the daemon knows more kinds of compression, and says what is wrong with a tar
            if isinstance(error, tarfile.ReadError):
                return False
            raise ImageError(f"{path} is no tar: {error}") from None
    return first is not None and _FIRST.fullmatch(first.name) is not None


@contextmanager
def _tar(path: str) -> Iterator[IO[bytes]]:
    with open(path, "rb") as file:
        packed = file.peek(2)[:2] == _GZIP
        if packed:
            with gzip.open(file) as unpacked:
                yield unpacked  # type: ignore[misc]  # a file as any other, to tarfile
        else:
            yield file


@contextmanager
def open_files(source: str) -> Iterator[Files]:
    """The files of an image, at a path of a directory or a tar, for as long as the block lasts.

    Raises ImageError, OSError.
    """
    if os.path.isdir(source):
        yield Files(source, None)
        return
    with open(source, "rb") as file:
        if file.peek(2)[:2] != _GZIP:
            yield Files(source, _members(source, file))
            return
        with tempfile.TemporaryFile() as whole:
            try:
                with gzip.open(file) as unpacked:
                    shutil.copyfileobj(unpacked, whole, 1 << 20)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ImageError(f"{source} is cut short, or damaged: {error}") from None
            whole.seek(0)
            yield Files(source, _members(source, whole))


def _members(source: str, file: IO[bytes]) -> dict[str, Blob]:
    found: dict[str, Blob] = {}
    links: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = os.path.normpath(member.name)
                if member.isreg():
                    found[name] = Blob(file, member.size, member.offset_data)
                elif member.issym():
                    # docker save before 25: a layer that is there under another name
                    links[name] = os.path.normpath(
                        os.path.join(os.path.dirname(name), member.linkname)
                    )
                elif member.islnk():
                    links[name] = os.path.normpath(member.linkname)
    except (tarfile.TarError, EOFError) as error:
        raise ImageError(f"{source} is no whole tar: {error}") from None
    for name in links:
        at = name
        for _ in range(_LINKS):
            at = links.get(at, at)
        if at in found:
            found[name] = found[at]
    return found
