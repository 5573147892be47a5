"""`.aufsd/format`: that a store is ours to serve, who it is, and which backend wrote to it last."""

import os
import re
import secrets
import stat
from typing import Final, Literal

import msgspec

from aufsd.store.content import fsync
from aufsd.store.layout import Layout
from aufsd_client.errors import StoreNotAdopted

Sync = Literal["filesystem", "none"]

FORMAT = 1
_ID: Final = re.compile(r"[0-9a-f]{32}")


class Format(msgspec.Struct, forbid_unknown_fields=False):
    """What the file says. `adopted`: the store held layers before aufsd came.

    `id` tells the store from others, and from one that lies at its root later; "" for none.
    """

    format: int = FORMAT
    adopted: bool = False
    backend: str = ""
    id: str = ""


def new_id() -> str:
    """An id that no other store has."""
    return secrets.token_hex(16)


def read_format(layout: Layout) -> Format | None:
    """What the file says, or None where aufsd has never served this root.

    One that cannot be read still says that the store is ours; it is written anew at start. Raises
    StoreNotAdopted for a store that a newer aufsd has written.
    """
    try:
        with open(layout.format, "rb") as file:
            found = msgspec.json.decode(file.read(), type=Format)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError:
        return Format(adopted=True)
    if found.format > FORMAT:
        raise StoreNotAdopted(
            f"{layout.root} was written by a newer aufsd: its format is {found.format}, and this "
            f"one knows {FORMAT}",
            root=layout.root,
        )
    if not _ID.fullmatch(found.id):
        # it becomes part of a file's name
        found.id = ""
    return found


def write_format(layout: Layout, content: Format, sync: Sync) -> None:
    """Replace `.aufsd/format` atomically."""
    fresh = f"{layout.format}.new"
    write_durably(fresh, msgspec.json.encode(content).decode() + "\n", sync)
    os.rename(fresh, layout.format)
    if sync != "none":
        fsync(layout.private)


def write_durably(path: str, text: str, sync: Sync, *, like: os.stat_result | None = None) -> None:
    """Write a file anew, and its content to the disk; a name that lasts is the caller's to make.

    `like`: with the mode and the time of another.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o644), "w") as file:
        file.write(text)
        file.flush()
        if like is not None:
            os.fchmod(file.fileno(), stat.S_IMODE(like.st_mode))
            os.utime(file.fileno(), ns=(like.st_atime_ns, like.st_mtime_ns))
        if sync != "none":
            os.fsync(file.fileno())
