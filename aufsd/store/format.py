"""The file `.aufsd/format`: the store's id, whether it was adopted, and its last backend."""

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
    """The content of the file. `adopted`: the store had layers before aufsd served it.

    `id` identifies the store, also against another one that is at the same path later; "" for none.
    """

    format: int = FORMAT
    adopted: bool = False
    backend: str = ""
    id: str = ""


def new_id() -> str:
    """An id that no other store has."""
    return secrets.token_hex(16)


def read_format(layout: Layout) -> Format | None:
    """The content of the file; None if aufsd has never served this root.

    A file that cannot be parsed still means that aufsd served it, and is written again at start.
    Raises StoreNotAdopted for a store of a newer aufsd.
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
        # the id becomes part of a file name
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
    """Write a file and sync its content. The caller syncs its name.

    `like`: another file, whose mode and time the file gets.
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
