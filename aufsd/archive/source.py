"""Reads a tar from a descriptor, decompressed, in a window for headers and small files.

Large bodies that need not be looked at are copied from the pipe or file to the target in the
kernel, past the window. An error of the descriptor is StreamBroken; wrong bytes are BadArchive.
"""

import errno
import hashlib
import mmap
import os
import select
import stat
import time
from collections.abc import Callable
from typing import Final, Protocol

from aufsd.archive import compressed
from aufsd.archive.headers import BLOCK
from aufsd.archive.meter import Meter
from aufsd.kernel import pipes
from aufsd_client.errors import BadArchive, StreamBroken

_WINDOW: Final = 1 << 20
# the most that a decoder gives at a time; the buffer has this much room beyond the window
_STEP: Final = 128 << 10
# a body that has more than this beyond the window is copied by the kernel
_LARGE: Final = 256 << 10
# what it may be instead of a tar, gzip or zstd, by its first bytes; and what makes a tar of it
_OTHERS: Final = {
    b"\xfd7zXZ\0": ("compressed with xz", "xz -dc FILE"),
    b"BZh": ("compressed with bzip2", "bzip2 -dc FILE"),
    b"\x04\x22\x4d\x18": ("compressed with lz4", "lz4 -dc FILE"),
    b"\x02\x21\x4c\x18": ("compressed with lz4", "lz4 -dc FILE"),
    b"\x5d\0\0": ("compressed with lzma", "xz --format=lzma -dc FILE"),
    b"LZIP": ("compressed with lzip", "lzip -dc FILE"),
    b"\x89LZO\0": ("compressed with lzop", "lzop -dc FILE"),
    b"\x1f\x9d": ("compressed with compress", "gzip -dc FILE"),
    b"PK\3\4": ("a zip archive", "bsdtar -cf - @FILE"),
    b"7z\xbc\xaf": ("a 7z archive", "bsdtar -cf - @FILE"),
    b"070701": ("a cpio archive", "bsdtar -cf - @FILE"),
    b"!<arch>\n": ("an ar archive (a Debian package is one)", "ar p FILE data.tar.gz"),
}
_NOT_FOR_THESE: Final = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EBADF)


class Decoder(Protocol):
    """Makes tar bytes of the descriptor's."""

    def next(self) -> bytes:
        """At most a step of bytes; b"" at the end."""


class Source:
    """Where a tar is read from. The descriptor stays the caller's.

    `offset` is how many bytes of the tar were consumed.
    """

    __slots__ = (
        *("_at", "_decoder", "_end", "_fd", "_hash", "_memory", "_meter", "_mover"),
        *("_raw", "_raw_at", "_tar_hash", "_view", "offset"),
    )

    def __init__(self, fd: int, meter: Meter, *, digest: bool) -> None:
        self._fd = fd
        self._meter = meter
        self._hash = hashlib.sha256() if digest else None
        # of what a decoder makes of it; without one it is the same
        self._tar_hash = self._hash
        # pages that a small archive does not reach are never made, as those of a bytearray are
        self._memory = mmap.mmap(-1, _WINDOW + _STEP)
        self._view = memoryview(self._memory)
        self._at = 0
        self._end = 0
        self._raw = b""
        self._raw_at = 0
        self._decoder: Decoder | None = None
        self.offset = 0
        self._mover = None if digest else _mover(fd)
        pipes.enlarge(fd, _WINDOW)
        self._detect()

    # --- what the reader of the tar asks for --------------------------------------------------

    def block(self) -> bytes:
        """The next 512 bytes; fewer at the end of the stream."""
        if self._end - self._at < BLOCK:
            self._gather(BLOCK)
        at = self._at
        stop = self._at = min(at + BLOCK, self._end)
        self.offset += stop - at
        return self._memory[at:stop]

    def peek(self, count: int) -> memoryview | None:
        """The next `count` bytes without consuming them, valid until the next call.

        None if that is more than the window holds. Raises BadArchive if the stream has fewer.
        """
        if self._end - self._at < count:
            if count > _WINDOW:
                return None
            self._gather(count)
            if self._end - self._at < count:
                raise self.cut_short()
        return self._view[self._at : self._at + count]

    def window(self) -> tuple[mmap.mmap, memoryview, int, int]:
        """What is held: the buffer and a view of it, and where in it the next byte and the end are.

        Valid until something is read or copied; `skip` up to the end leaves it as it is.
        """
        return self._memory, self._view, self._at, self._end

    def skip(self, count: int) -> None:
        """Consume `count` bytes."""
        self.offset += count
        held = self._end - self._at
        while count > held:
            count -= held
            self._at = self._end = 0
            self._fill()
            held = self._end
            if not held:
                raise self.cut_short()
        self._at += count

    def take(self, count: int) -> bytes:
        """Consume `count` bytes and return them; for what is known to be small."""
        at = self._at
        if count <= self._end - at:
            self._at += count
            self.offset += count
            return self._memory[at : at + count]
        parts = []
        while count:
            step = min(count, _WINDOW)
            view = self.peek(step)
            assert view is not None
            parts.append(view.tobytes())
            self.skip(step)
            count -= step
        return b"".join(parts)

    def copy(self, target: int, count: int) -> None:
        """Consume `count` bytes into the file `target` at its position.

        Errors of the target are raised as the OSError they are.
        """
        while count:
            held = min(self._end - self._at, count)
            if held:
                self._write(target, self._view[self._at : self._at + held])
                self._at += held
                self.offset += held
                count -= held
                continue
            self._at = self._end = 0
            if self._mover is not None and count >= _LARGE:
                count -= self._move(target, count)
                continue
            self._fill()
            if not self._end:
                raise self.cut_short()

    def drain(self) -> bool:
        """Consume the rest of the stream; whether it held nothing but zeros."""
        clean = True
        while True:
            if self._at < self._end:
                rest = self._view[self._at : self._end]
                clean = clean and not rest.tobytes().strip(b"\0")
                self.offset += len(rest)
            self._at = self._end = 0
            self._fill()
            if not self._end:
                return clean

    def cut_short(self) -> BadArchive:
        """The error for a stream that ends where more has to come."""
        return BadArchive("the stream is cut short", offset=self.offset)

    def digest(self) -> str | None:
        """`sha256:HEX` of the descriptor's bytes up to here, if asked for."""
        return f"sha256:{self._hash.hexdigest()}" if self._hash else None

    def diff_id(self) -> str | None:
        """The same of the tar that they hold: what an image's configuration calls its diff id."""
        return f"sha256:{self._tar_hash.hexdigest()}" if self._tar_hash else None

    # --- where they come from -----------------------------------------------------------------

    def _detect(self) -> None:
        """Look at the first bytes; a stream shorter than that is left to the reader."""
        self._gather(BLOCK)
        first = self._view[: min(4, self._end)].tobytes()
        decoder: type[compressed.Gzip] | type[compressed.Zstd]
        if first.startswith(compressed.GZIP):
            decoder = compressed.Gzip
        elif first == compressed.ZSTD or (len(first) == 4 and first[1:] == b"\x2a\x4d\x18"):
            decoder = compressed.Zstd
        else:
            self._refuse(self._view[: min(8, self._end)].tobytes())
            return
        self._raw = self._view[: self._end].tobytes()
        self._at = self._end = 0
        self._mover = None
        self._tar_hash = hashlib.sha256() if self._hash else None
        self._decoder = decoder(self._raw_bytes)

    def _refuse(self, first: bytes) -> None:
        """Raise BadArchive for a stream that others can read, with the command that makes it a tar.

        A tar may begin with a name that looks like one of these, but says what it is further on.
        """
        is_tar = self._view[257:262].tobytes() == b"ustar"
        for magic, (name, command) in _OTHERS.items():
            if first.startswith(magic) and not is_tar:
                raise BadArchive(
                    f"the stream is {name}, which is not read here: send what `{command}` writes",
                    offset=0,
                )

    def _gather(self, count: int) -> None:
        """Have at least `count` bytes in the window, unless the stream ends before."""
        if self._at + count > _WINDOW or self._at == self._end:
            held = self._end - self._at
            self._view[:held] = self._view[self._at : self._end].tobytes()
            self._at, self._end = 0, held
        while self._end - self._at < count:
            before = self._end
            self._fill()
            if self._end == before:
                return

    def _fill(self) -> None:
        """Read more into the window behind what it holds; nothing more at the end."""
        if self._decoder is None:
            self._end += self._read_into(self._view[self._end :])
            return
        try:
            data = self._decoder.next()
        except compressed.Damaged as error:
            raise BadArchive(str(error), offset=self.offset) from None
        if self._tar_hash:
            self._tar_hash.update(data)
        self._view[self._end : self._end + len(data)] = data
        self._end += len(data)

    def _raw_bytes(self, count: int) -> bytes:
        """Bytes of the compressed stream; fewer than `count` only at its end."""
        while len(self._raw) - self._raw_at < count:
            more = bytearray(256 << 10)
            got = self._read_into(memoryview(more))
            if not got:
                break
            self._raw = self._raw[self._raw_at :] + bytes(more[:got])
            self._raw_at = 0
        data = self._raw[self._raw_at : self._raw_at + count]
        self._raw_at += len(data)
        return data

    def _read_into(self, view: memoryview) -> int:
        got = self._waiting(lambda: os.readv(self._fd, (view,)))
        if self._hash:
            self._hash.update(view[:got])
        self._meter.bytes += got
        self._meter.tick()
        return got

    def _move(self, target: int, count: int) -> int:
        """Copy in the kernel, at least one byte; 0 if these descriptors do not allow it."""
        assert self._mover is not None
        mover = self._mover
        try:
            moved = self._waiting(lambda: mover(self._fd, target, min(count, 1 << 24)), target=True)
        except OSError as error:
            if error.errno not in _NOT_FOR_THESE:
                raise
            self._mover = None
            return 0
        if not moved:
            raise self.cut_short()
        self.offset += moved
        self._meter.bytes += moved
        self._meter.tick()
        return moved

    def _waiting(self, call: Callable[[], int], *, target: bool = False) -> int:
        self._meter.waiting_since = time.monotonic()
        try:
            return self._called(call, target=target)
        finally:
            self._meter.waiting_since = None

    def _called(self, call: Callable[[], int], *, target: bool) -> int:
        while True:
            try:
                return call()
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._fd, select.POLLIN)
                poll.poll()
            except OSError as error:
                if target and error.errno not in (errno.ECONNRESET, errno.EIO):
                    raise
                name = errno.errorcode.get(error.errno or 0, "EIO")
                raise StreamBroken(
                    f"reading the stream failed: {error.strerror}", errno=name
                ) from error

    def _write(self, target: int, data: memoryview) -> None:
        while data:
            data = data[os.write(target, data) :]


def _mover(fd: int) -> Callable[[int, int, int], int] | None:
    """The kernel's way to copy from this kind of file."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode):
        return _splice
    if stat.S_ISREG(mode):
        return os.copy_file_range
    return None


def _splice(source: int, target: int, count: int) -> int:
    return os.splice(source, target, count)
