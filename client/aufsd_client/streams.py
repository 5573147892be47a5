"""What a tar may come from and go to: a descriptor to send, from whatever the caller has.

The descriptors of the caller's own objects stay the caller's. Standard library only.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol


class HasFileno(Protocol):
    """A file, a socket, a pipe's end."""

    def fileno(self) -> int: ...


Path = str | os.PathLike[str]


@contextmanager
def source(given: HasFileno | Path | bytes | bytearray | memoryview) -> Iterator[int]:
    """A descriptor to read the tar from: an object's, that of a path's file, or of bytes given."""
    if isinstance(given, (bytes, bytearray, memoryview)):
        # a regular file in memory, so that no thread has to write into a pipe meanwhile
        with open(os.memfd_create("aufsd-apply", os.MFD_CLOEXEC), "wb", buffering=0) as file:
            rest = memoryview(given).cast("B")
            while rest:
                rest = rest[file.write(rest) :]
            file.seek(0)
            yield file.fileno()
    elif isinstance(given, (str, os.PathLike)):
        with open(given, "rb", buffering=0) as file:
            yield file.fileno()
    else:
        yield given.fileno()


@contextmanager
def sink(given: HasFileno | Path | bytearray) -> Iterator[int]:
    """A descriptor to write the tar to: of an object, of a file made at a path, into a bytearray.

    A file that is made here does not stay if the call fails; one that was there is overwritten.
    """
    if isinstance(given, bytearray):
        with open(os.memfd_create("aufsd-diff", os.MFD_CLOEXEC), "w+b", buffering=0) as file:
            yield file.fileno()
            file.seek(0)
            given += file.read()
    elif isinstance(given, (str, os.PathLike)):
        fd, made = _create(given)
        try:
            yield fd
        except BaseException:
            if made:
                with suppress(FileNotFoundError):
                    os.unlink(given)
            raise
        finally:
            os.close(fd)
    else:
        flush = getattr(given, "flush", None)
        if callable(flush):
            # what the object holds back belongs before the tar
            flush()
        yield given.fileno()


def _create(path: Path) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, flags | os.O_TRUNC, 0o666), False
