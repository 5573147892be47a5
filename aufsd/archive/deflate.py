"""gzip streams (RFC 1952), a bounded piece at a time, by Intel's isa-l."""

from collections.abc import Callable
from typing import Final

from isal import isal_zlib

MAGIC: Final = b"\x1f\x8b"
_STEP: Final = 128 << 10


class GzipError(ValueError):
    """Not a gzip stream, or one that is cut short."""


class Members:
    """Decompresses member after member from `read(n)`, which gives n bytes, fewer at the end."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._object = isal_zlib.decompressobj(wbits=31)
        self._rest = b""

    def next(self) -> bytes:
        """128 KiB at most; b"" at the end. Raises GzipError."""
        while True:
            if self._object.eof and not self._begin():
                return b""
            piece = self._rest or self._read(64 << 10)
            try:
                data: bytes = self._object.decompress(piece, _STEP)
            except isal_zlib.IsalError as error:  # type: ignore[misc]  # typed as an instance
                raise GzipError(f"the gzip stream is damaged: {error}") from None
            self._rest = self._object.unused_data or self._object.unconsumed_tail
            if data:
                return data
            if not piece:
                raise GzipError("the gzip stream is cut short")

    def _begin(self) -> bool:
        """Whether another member follows. gzip(1) takes zeros after the last one, so do we."""
        self._rest = self._rest.lstrip(b"\0")
        while not self._rest:
            more = self._read(64 << 10)
            if not more:
                return False
            self._rest = more.lstrip(b"\0")
        self._rest += self._read(2) if len(self._rest) < 2 else b""
        if not self._rest.startswith(MAGIC):
            raise GzipError("something else follows the gzip stream")
        self._object = isal_zlib.decompressobj(wbits=31)
        return True
