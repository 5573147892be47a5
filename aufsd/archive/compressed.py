"""Decompresses gzip (RFC 1952) and zstd (RFC 8878), a bounded piece at a time.

gzip is decompressed by Intel's isa-l. In zstd a few bytes may stand for 128 KiB, and zstandard
returns all output of a piece of input at once. So the input is cut at the ends of blocks (section
3.1.1). This also finds a stream that ends too early, which zstandard does not report.
"""

from collections.abc import Callable
from typing import Final, Protocol

import zstandard
from isal import isal_zlib

GZIP: Final = b"\x1f\x8b"
_STEP: Final = 128 << 10
# zstd; skippable frames have one of sixteen other magic numbers
ZSTD: Final = b"\x28\xb5\x2f\xfd"
_SKIPPABLE: Final = b"\x2a\x4d\x18"
# a decoder holds a window of what it made last, as large as the frame's header says: 8 MiB for most
# levels, 128 for `zstd --ultra -22`, the most that zstd(1) takes without being asked to
_WINDOW_MAX: Final = 1 << 27
_CHECKSUM: Final = 4


class Damaged(ValueError):
    """The stream is damaged, or ends too early."""


# --- gzip -------------------------------------------------------------------------------------


class Gzip:
    """Decompresses member after member from `read(n)`, which gives n bytes, fewer at the end."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._object = isal_zlib.decompressobj(wbits=31)
        self._rest = b""

    def next(self) -> bytes:
        """128 KiB at most; b"" at the end. Raises Damaged."""
        while True:
            if self._object.eof and not self._begin():
                return b""
            piece = self._rest or self._read(64 << 10)
            try:
                data: bytes = self._object.decompress(piece, _STEP)
            except isal_zlib.IsalError as error:  # type: ignore[misc]  # typed as an instance
                raise Damaged(f"the gzip stream is damaged: {error}") from None
            self._rest = self._object.unused_data or self._object.unconsumed_tail
            if data:
                return data
            if not piece:
                raise Damaged("the gzip stream is cut short")

    def _begin(self) -> bool:
        """Whether another member follows. gzip(1) takes zeros after the last one, so do we."""
        self._rest = self._rest.lstrip(b"\0")
        while not self._rest:
            more = self._read(64 << 10)
            if not more:
                return False
            self._rest = more.lstrip(b"\0")
        self._rest += self._read(2) if len(self._rest) < 2 else b""
        if not self._rest.startswith(GZIP):
            raise Damaged("something else follows the gzip stream")
        self._object = isal_zlib.decompressobj(wbits=31)
        return True


# --- zstd -------------------------------------------------------------------------------------


class _Decompressor(Protocol):
    def decompress(self, data: bytes) -> bytes: ...


class Zstd:
    """Decompresses frame after frame from `read(n)`, which gives n bytes, fewer at the end."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._object: _Decompressor | None = None
        self._checksum = False

    def next(self) -> bytes:
        """What the next block stands for, 128 KiB at most; b"" at the end. Raises Damaged."""
        while True:
            if self._object is None and not self._begin():
                return b""
            head = self._exactly(3)
            word = int.from_bytes(head, "little")
            last, kind, size = word & 1, word >> 1 & 3, word >> 3
            if kind == 3 or size > 128 << 10:
                raise Damaged("a zstd block is malformed")
            # a run-length block is one byte long, whatever it stands for
            data = head + self._exactly(1 if kind == 1 else size)
            if last and self._checksum:
                data += self._exactly(_CHECKSUM)
            found = self._decompress(data)
            if last:
                self._object = None
            if found:
                return found

    def _begin(self) -> bool:
        """Read a frame's header; False at the end of the stream."""
        while True:
            magic = self._read(4)
            if not magic:
                return False
            if len(magic) == 4 and 0x50 <= magic[0] <= 0x5F and magic[1:] == _SKIPPABLE:
                size = int.from_bytes(self._exactly(4), "little")
                while size:
                    size -= len(self._exactly(min(size, 1 << 20)))
                continue
            if magic != ZSTD:
                raise Damaged("something else follows the zstd stream")
            descriptor = self._exactly(1)
            flags = descriptor[0]
            single = flags >> 5 & 1
            dictionary = (0, 1, 2, 4)[flags & 3]
            content = (single, 2, 4, 8)[flags >> 6]
            rest = self._exactly((not single) + dictionary + content)
            window = _size(rest[dictionary:]) if single else _window(rest[0])
            if window > _WINDOW_MAX:
                raise Damaged(
                    f"the zstd stream needs a window of {window >> 20} MiB, and no more than "
                    f"{_WINDOW_MAX >> 20} are given: compress it with less than --long=28"
                )
            self._checksum = bool(flags >> 2 & 1)
            made: _Decompressor = zstandard.ZstdDecompressor(
                max_window_size=_WINDOW_MAX
            ).decompressobj()
            self._object = made
            self._decompress(magic + descriptor + rest)
            return True

    def _decompress(self, data: bytes) -> bytes:
        assert self._object is not None
        try:
            return self._object.decompress(data)
        except zstandard.ZstdError as error:
            raise Damaged(f"the zstd stream is damaged: {error}") from None

    def _exactly(self, count: int) -> bytes:
        data = self._read(count)
        if len(data) < count:
            raise Damaged("the zstd stream is cut short")
        return data


def _window(descriptor: int) -> int:
    """Bytes (RFC 8878, section 3.1.1.1.2): an exponent and eighths."""
    base = 1 << (10 + (descriptor >> 3))
    return base + (base >> 3) * (descriptor & 7)


def _size(field: bytes) -> int:
    """The content of a frame that is one segment, whose window is all of it (section 3.1.1.1.4)."""
    return int.from_bytes(field, "little") + (256 if len(field) == 2 else 0)
