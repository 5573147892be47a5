"""Writes a tar to a descriptor: headers and small files from a buffer, the rest copied in the
kernel.

Every error of the descriptor is StreamBroken, even if a disk behind it is full.
"""

import errno
import hashlib
import os
import select
import time
from collections.abc import Callable
from typing import Final

from aufsd.archive.headers import BLOCK
from aufsd.archive.meter import Meter
from aufsd.kernel import pipes
from aufsd_client.errors import StreamBroken

_PIPE: Final = 1 << 20
_WINDOW: Final = 1 << 20
# headers and small bodies are held back to be written together
_HELD_MAX: Final = 256 << 10
# a body up to this size is one of them: one read, and a share of one write
_SMALL: Final = 64 << 10
_ZEROS: Final = bytes(64 << 10)
_STEP: Final = 1 << 24


class Sink:
    """Where a tar is written to. The descriptor stays the caller's."""

    __slots__ = ("_copies", "_fd", "_hash", "_held", "_meter", "_parts", "_window")

    def __init__(self, fd: int, meter: Meter, *, digest: bool) -> None:
        self._fd = fd
        self._meter = meter
        self._hash = hashlib.sha256() if digest else None
        # what waits for the next write, and how many bytes that is
        self._parts: list[bytes] = []
        self._held = 0
        # a digest needs every byte in this process
        self._copies = not digest
        self._window: memoryview | None = None
        pipes.enlarge(fd, _PIPE)

    def write(self, data: bytes) -> None:
        """Add bytes; they may be held back."""
        self._parts.append(data)
        self._held += len(data)
        if self._held >= _HELD_MAX:
            self.flush()

    def file(self, header: bytes, fd: int, size: int) -> int:
        """Add a header, `size` bytes from a regular file's start, and padding to the block.

        What the file lacks is filled with zeros; returns how many bytes those were.
        """
        if size > _SMALL:
            self.write(header)
            missing = self._large(fd, size)
            self.write(_ZEROS[: -size % BLOCK])
            return missing
        data = os.read(fd, size) if size else b""
        missing = size - len(data)
        if missing:
            while more := os.read(fd, missing):
                data += more
                missing -= len(more)
        padding = missing + -size % BLOCK
        self._parts += (header, data, _ZEROS[:padding])
        self._held += len(header) + len(data) + padding
        if self._held >= _HELD_MAX:
            self.flush()
        return missing

    def _large(self, fd: int, size: int) -> int:
        """Bytes that were missing. Data by sendfile or through the buffer, holes as zeros."""
        self.flush()
        at = 0
        sparse = os.fstat(fd).st_blocks * 512 < size
        while at < size:
            stop = size
            if sparse:
                start = _seek(fd, at, os.SEEK_DATA, size)
                self.zeros(start - at)
                self.flush()
                if start == size:
                    # a hole up to the end, or up to where the file ends by now
                    return max(0, size - max(os.fstat(fd).st_size, at))
                at = start
                stop = _seek(fd, at, os.SEEK_HOLE, size)
            done = self._copy(fd, at, stop - at)
            at += done
            if done == 0 and at < size:
                self.zeros(size - at)
                return size - at
        return 0

    def _copy(self, fd: int, offset: int, count: int) -> int:
        """Copy up to `count` bytes of a file from `offset`; 0 at its end."""
        done = 0
        while self._copies and done < count:
            try:
                sent = self._waiting(os.sendfile, fd, offset + done, min(count - done, _STEP))
            except StreamBroken as error:
                # a descriptor that sendfile(2) cannot write to, such as one opened with O_APPEND
                if done or error.data["errno"] != "EINVAL":
                    raise
                self._copies = False
                break
            if sent == 0:
                return done
            done += sent
            self._count(sent)
        if done < count and self._window is None:
            self._window = memoryview(bytearray(_WINDOW))
        while done < count:
            assert self._window is not None
            got = os.preadv(fd, (self._window[: min(count - done, _WINDOW)],), offset + done)
            if got == 0:
                break
            self._send(self._window[:got])
            done += got
        return done

    def zeros(self, count: int) -> None:
        """Add this many zero bytes."""
        while count:
            step = min(count, len(_ZEROS))
            self.write(_ZEROS if step == len(_ZEROS) else _ZEROS[:step])
            count -= step

    def flush(self) -> None:
        """Write what is held back."""
        if self._held:
            data = b"".join(self._parts)
            self._parts.clear()
            self._held = 0
            self._send(memoryview(data))

    def digest(self) -> str | None:
        """`sha256:HEX` of what was written, if asked for."""
        return f"sha256:{self._hash.hexdigest()}" if self._hash else None

    def _send(self, data: memoryview) -> None:
        if self._hash:
            self._hash.update(data)
        while data:
            sent = self._waiting(os.write, data)
            data = data[sent:]
            self._count(sent)

    def _waiting(self, call: Callable[..., int], *args: object) -> int:
        """What the call on our descriptor returns; if that is full, once it has room again."""
        self._meter.waiting_since = time.monotonic()
        try:
            return self._called(call, *args)
        finally:
            self._meter.waiting_since = None

    def _called(self, call: Callable[..., int], *args: object) -> int:
        while True:
            try:
                return call(self._fd, *args)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError as error:
                name = errno.errorcode.get(error.errno or 0, "EIO")
                raise StreamBroken(
                    f"writing the stream failed: {error.strerror}", errno=name
                ) from error

    def _count(self, sent: int) -> None:
        self._meter.bytes += sent
        self._meter.tick()


def _seek(fd: int, at: int, whence: int, size: int) -> int:
    """lseek(2) for data or a hole, at most `size`; past the last data it fails with ENXIO."""
    try:
        return min(os.lseek(fd, at, whence), size)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        if error.errno == errno.EINVAL:
            return at if whence == os.SEEK_DATA else size
        raise
