"""Tars that no well-behaved tool writes, made with Python's tarfile."""

import io
import tarfile
from typing import Any

FILE, LINK, SYMLINK = tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE
CHARACTER, DIRECTORY = tarfile.CHRTYPE, tarfile.DIRTYPE


def entry(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """One entry: a regular file with `data`, or what `type` and other TarInfo fields say."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    info.mtime = 1_500_000_000
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def directory(name: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A directory."""
    return entry(name, type=DIRECTORY, **{"mode": 0o755, **fields})


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    """A symlink."""
    return entry(name, type=SYMLINK, linkname=target)


def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    """A hard link."""
    return entry(name, type=LINK, linkname=target)


def tar(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """The archive of these, in this order, with an end marker."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def listing(stream: bytes) -> list[tarfile.TarInfo]:
    """The entries of an archive as tarfile reads them."""
    with tarfile.open(fileobj=io.BytesIO(stream), errors="surrogateescape") as archive:
        return archive.getmembers()
