"""Lists a directory of a layer, in the order and with the names of the layer's tar.

The list is the same in both dialects, so both give the same tar and the same fingerprint.
"""

import os
from collections.abc import Collection, Iterator
from typing import Final, NamedTuple

from aufsd.archive.compact import AT_A_TIME, Ordered, in_order, once
from aufsd.archive.meter import Meter, shown
from aufsd.archive.view import GONE, Layer
from aufsd.store import whiteouts
from aufsd.store.walk import Way

# what the last byte of a row says of its name: content
FILE: Final = ord("f")
SUBDIRECTORY: Final = ord("d")
OTHER: Final = ord("o")
# a file that has other names which were made later
LINKED: Final = ord("l")
# a mark: the name with `.wh.`, and that of an opaque directory
WHITEOUT: Final = ord("w")
OPAQUE: Final = ord("q")


class Listing(NamedTuple):
    """A directory, sorted.

    Each of `rows` is a name, a NUL and what that is. `beside`: some directory in it stands beside a
    whiteout of its own name, which makes it opaque. `cut`: for what the directories in it hold,
    nothing lies below in this layer's parents.
    """

    rows: Iterator[bytes]
    beside: bool
    cut: bool


def listed(
    meter: Meter,
    layer: Layer,
    way: Way,
    *,
    opaque: bool,
    cut: bool | None,
    linked: Collection[int] = (),
) -> Listing:
    """List the current directory, which is `opaque` also if a whiteout of its name says so.

    `cut`: one above it is opaque. Then, or if it is opaque itself, whiteouts in it hide nothing,
    and are left out (settling.py); but not in the root, which is always merged. None: not at all.
    `linked` are inodes of files that are told apart.
    """
    found = Ordered()
    some: list[bytes] = []
    add, aufs, overlay = some.append, layer.marks.aufs, layer.marks.overlay
    beside = marked = False
    with os.scandir(b".") as entries:
        for entry in entries:
            if len(some) >= AT_A_TIME:
                found.add_all(some)
            name = entry.name
            if name.startswith(whiteouts.WHITEOUT):
                if aufs and name == whiteouts.OPAQUE:
                    marked = True
                elif aufs and (hidden := whiteouts.deleted_name(name)) is not None:
                    if layer.marks.is_content(hidden):
                        # it is there, and what lies below it is not
                        beside = True
                    else:
                        add(name + b"\0w")
                elif not (aufs and way.above is None and name in whiteouts.HOUSEKEEPING):
                    left = shown(Way(way, name).path())
                    meter.warn(f"left out {left}: an archive cannot hold such a name")
            elif overlay and _is_whiteout(layer, entry):
                add(whiteouts.WHITEOUT + name + b"\0w")
            elif entry.is_file(follow_symlinks=False):
                add(name + (b"\0l" if linked and entry.inode() in linked else b"\0f"))
            elif entry.is_dir(follow_symlinks=False):
                add(name + b"\0d")
            else:
                add(name + b"\0o")
    if opaque or marked:
        add(whiteouts.OPAQUE + b"\0q")
    # a conversion that is half done may have a whiteout in both dialects
    rows = in_order(found, some)
    if aufs and overlay:
        rows = once(rows)
    if cut is not None:
        cut = cut or opaque or marked
        if cut and way.above is not None:
            rows = (row for row in rows if row[-1] != WHITEOUT)
    return Listing(rows, beside, bool(cut))


def _is_whiteout(layer: Layer, entry: "os.DirEntry[bytes]") -> bool:
    try:
        return layer.marks.is_whiteout_entry(entry)
    except OSError as error:
        if error.errno not in GONE:
            raise
        return False
