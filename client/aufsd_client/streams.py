"""What a tar may come from and go to: a descriptor to send, from whatever the caller has.

The descriptors of the caller's own objects stay the caller's. Standard library only.
"""

import os
import stat
import threading
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

    At a path, the file has its name when all of it is there: if the call fails, what was there
    before is there still. A device or a pipe at the path is written to.
    """
    if isinstance(given, bytearray):
        with open(os.memfd_create("aufsd-diff", os.MFD_CLOEXEC), "w+b", buffering=0) as file:
            yield file.fileno()
            file.seek(0)
            given += file.read()
    elif isinstance(given, (str, os.PathLike)):
        with _written(os.path.realpath(given)) as fd:
            yield fd
    else:
        flush = getattr(given, "flush", None)
        if callable(flush):
            # what the object holds back belongs before the tar
            flush()
        yield given.fileno()


@contextmanager
def _written(path: str) -> Iterator[int]:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = 0
    if mode and not stat.S_ISREG(mode):
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
        return
    beside = f"{path}.{os.getpid()}-{threading.get_ident()}.new"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        try:
            if mode:
                os.fchmod(fd, stat.S_IMODE(mode))
            yield fd
        finally:
            os.close(fd)
        os.rename(beside, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(beside)
        raise
