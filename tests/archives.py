"""Small tars for tests, made with Python's own tarfile, which shares no code with ours; and those
that the tests come with, unpacked by GNU tar."""

import io
import lzma
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

Entry = bytes | str | tarfile.TarInfo | None


def tar(entries: Mapping[str, Entry]) -> bytes:
    """A tar stream: bytes are a file, a str is a symlink's target, None is a directory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, what in entries.items():
            if isinstance(what, tarfile.TarInfo):
                archive.addfile(what)
                continue
            info = tarfile.TarInfo(name)
            info.mtime = 1_500_000_000
            if what is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
            elif isinstance(what, str):
                info.type, info.linkname = tarfile.SYMTYPE, what
                archive.addfile(info)
            else:
                info.mode, info.size = 0o644, len(what)
                archive.addfile(info, io.BytesIO(what))
    return out.getvalue()


def names(stream: bytes) -> list[str]:
    """The names in a tar, as tarfile reads it."""
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        return archive.getnames()


def unpack_xz(archive: Path, directory: Path) -> None:
    """What GNU tar makes of a tar.xz, owners and all xattrs; xz need not be installed."""
    command = ["tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", "-"]
    with lzma.open(archive) as file:
        subprocess.run([*command, "-C", directory], input=file.read(), check=True)
