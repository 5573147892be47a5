"""A layer's original tar, put together from its files and what Docker kept of the tar.

`tar-split.json.gz` (github.com/vbatts/tar-split, tar/storage) has a line of JSON for each piece of
the stream, in order: raw bytes (headers, padding, the end), or a file whose content is put in,
with its size and its CRC-64. So the stream has the digest that a registry knows it by.
"""

import gzip
import hashlib
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import msgspec
from msgspec import Struct

from aufsd.kernel import syscalls

_FILE: Final = 1
_SEGMENT: Final = 2
_STEP: Final = 1 << 20
# a header with its PAX records comes to some kilobytes; a piece that is longer is no tar's
_LONGEST: Final = 64 << 20
# hash/crc64 of Go, ISO: the polynomial of ISO 3309, bits reversed
_POLYNOMIAL: Final = 0xD800000000000000


class _Piece(Struct):
    type: int
    name: str = ""
    # a name that is not UTF-8
    name_raw: bytes = b""
    size: int = 0
    # of a file its CRC-64, big-endian; of a segment its bytes
    payload: bytes | None = None


class Unusable(Exception):
    """There is no such record of the tar, or it cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Assembled:
    """What became of the tar. It is not whole if `damaged` names files, with what is wrong."""

    digest: str
    damaged: tuple[str, ...]


def assemble(split: Path, content: int, out: IO[bytes]) -> Assembled:
    """Write the tar to `out`; `content` is the directory that the layer's files lie in.

    Raises Unusable, and OSError if `out` cannot be written or a file not be read.
    """
    whole = hashlib.sha256()
    damaged: list[str] = []
    for piece in _pieces(split):
        if piece.type == _SEGMENT:
            data = piece.payload or b""
            whole.update(data)
            out.write(data)
        elif piece.size:
            problem = _copy(piece, content, out, whole)
            if problem:
                damaged.append(problem)
                break
    if damaged:
        damaged = list(differences(split, content))
    return Assembled(f"sha256:{whole.hexdigest()}", tuple(damaged))


def differences(split: Path, content: int) -> Iterator[str]:
    """The files that are not as they were when the tar was taken apart, with what is wrong.

    Reads every byte and sums it up in Python: for when it is known that something is wrong.
    """
    for piece in _pieces(split):
        if piece.type == _FILE and piece.size:
            try:
                with _opened(piece, content) as file:
                    if _crc64(file) != piece.payload:
                        yield f"{_shown(piece)}: its content was changed"
            except _Differs as error:
                yield str(error)


def _pieces(split: Path) -> Iterator[_Piece]:
    decoder = msgspec.json.Decoder(_Piece)
    try:
        with gzip.open(split) as lines:
            while line := lines.readline(_LONGEST):
                yield decoder.decode(line)
    except FileNotFoundError:
        raise Unusable("Docker kept no record of its tar") from None
    # EOFError is a file that was cut
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise Unusable(f"the record of its tar cannot be read: {error}") from error


class _Differs(Exception):
    """A file is not what was taken from the tar."""


def _copy(piece: _Piece, content: int, out: IO[bytes], whole: "hashlib._Hash") -> str:
    """Add a file's content; what is wrong with the file, "" for nothing."""
    left = piece.size
    try:
        with _opened(piece, content) as file:
            while left:
                data = file.read(min(left, _STEP))
                if not data:
                    return f"{_shown(piece)}: it is shorter than it was"
                left -= len(data)
                whole.update(data)
                out.write(data)
    except _Differs as error:
        return str(error)
    return ""


def _opened(piece: _Piece, content: int) -> IO[bytes]:
    """The file that a piece is about; symlinks lead no further up than to the layer's root."""
    name = piece.name_raw or piece.name.encode("utf-8", "surrogateescape")
    try:
        fd = syscalls.openat2(
            content,
            name,
            os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY,
            resolve=syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS,
        )
    except (FileNotFoundError, NotADirectoryError):
        raise _Differs(f"{_shown(piece)}: it is gone") from None
    except OSError as error:
        raise _Differs(f"{_shown(piece)}: {error.strerror}") from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size != piece.size:
        os.close(fd)
        what = f"{found.st_size} bytes, not {piece.size}"
        raise _Differs(
            f"{_shown(piece)}: it has {what}"
            if stat.S_ISREG(found.st_mode)
            else f"{_shown(piece)}: it is no file any more"
        )
    return open(fd, "rb", buffering=0)


def _shown(piece: _Piece) -> str:
    name = piece.name_raw.decode("utf-8", "backslashreplace") if piece.name_raw else piece.name
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name.removeprefix("./"))


# --- CRC-64 ---------------------------------------------------------------------------------------


def _table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _crc64(file: IO[bytes]) -> bytes:
    table = _table()
    crc = 0xFFFFFFFFFFFFFFFF
    while data := file.read(_STEP):
        for byte in data:
            crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return (crc ^ 0xFFFFFFFFFFFFFFFF).to_bytes(8, "big")
