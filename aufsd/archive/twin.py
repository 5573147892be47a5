"""Finds the inodes that differ between a layer and the parent that it was a snapshot of.

A snapshot has the same inode numbers as its parent, and btrfs records in each inode the transaction
that changed it last. So an inode that neither has changed since the snapshot is the same in both.
The tree search finds the changed ones without reading the others, as `btrfs subvolume find-new`
does. Times cannot be used: within one tick of the kernel's clock a snapshot and a change can be
made.

It needs CAP_SYS_ADMIN. Without it, two layers are compared entry by entry.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from aufsd.kernel import btrfs, syscalls
from aufsd.store.origin import read_origin

# BTRFS_LAST_FREE_OBJECTID
_LAST: Final = (1 << 64) - 256
_ANY: Final = (1 << 64) - 1
# struct btrfs_inode_item: generation, transid; nlink behind three more; btrfs_inode_extref
_TRANSID: Final = struct.Struct("<Q")
_NLINK: Final = struct.Struct("<I")
_EXTREF: Final = struct.Struct("<QQH")


@dataclass(frozen=True, slots=True)
class Twin:
    """The parent of a snapshot; `touched` are inodes that were changed in either of the two since.

    `leading` are the directories that lead to one. Devices tell the two from subvolumes in them.
    """

    touched: frozenset[int]
    leading: frozenset[int]
    devices: tuple[int, int]

    def same(self, now: os.stat_result, then: os.stat_result) -> bool:
        """Whether an entry of the layer and one of its parent are one inode that did not change."""
        return (
            now.st_ino == then.st_ino
            and now.st_ino not in self.touched
            and (now.st_dev, then.st_dev) == self.devices
        )

    def same_below(self, now: os.stat_result, then: os.stat_result) -> bool:
        """Whether nothing changed below the two directories either."""
        return self.same(now, then) and now.st_ino not in self.leading


def find(now: int, then: int, namespace: str) -> Twin | None:
    """What the tops of a layer and of its parent (descriptors) have in common.

    None if one is no snapshot of the other, or if that cannot be found out.
    """
    with suppress(OSError):
        tops = os.fstat(now), os.fstat(then)
        origin = read_origin(now, namespace)
        if origin is None or not all(map(btrfs.is_subvolume, tops, (now, then))):
            return None
        if btrfs.subvol_info(then).uuid != origin.uuid:
            return None
        # what is changed in memory only has no transaction yet
        syscalls.syncfs(now)
        touched: set[int] = set()
        leading: set[int] = set()
        for top, since in ((now, origin.generation), (then, origin.parted)):
            parents = _Parents(top)
            changed = set(parents.touched(since))
            touched |= changed
            # another subvolume's inodes are in another tree
            leading |= parents.above([*changed, *(inode for _, inode in btrfs.nested(top))])
            leading.update(inode for _, inode in btrfs.nested(top))
        return Twin(frozenset(touched), frozenset(leading), (tops[0].st_dev, tops[1].st_dev))
    return None


class _Parents:
    """The directories that inodes of one subvolume lie in."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._known: dict[int, int] = {}

    def touched(self, since: int) -> Iterator[int]:
        """Inodes that were changed after the transaction `since`."""
        single: set[int] = set()
        low, high = (btrfs.TOP, 0, 0), (_LAST, 255, _ANY)
        for item in btrfs.tree_search(self._top, low, high, since=since + 1):
            if item.type == btrfs.INODE_ITEM_KEY:
                # a leaf that was written anew holds older inodes too
                if _TRANSID.unpack_from(item.data, 8)[0] > since:
                    yield item.objectid
                if _NLINK.unpack_from(item.data, 40)[0] == 1:
                    single.add(item.objectid)
            elif item.type == btrfs.INODE_REF_KEY and item.objectid in single:
                self._known[item.objectid] = item.offset

    def above(self, inodes: Iterable[int]) -> set[int]:
        """Every directory on the way from the top to one of these."""
        found: set[int] = set()
        pending = list(inodes)
        while pending:
            for directory in self._of(pending.pop()):
                if directory not in found:
                    found.add(directory)
                    pending.append(directory)
        return found

    def _of(self, inode: int) -> Iterable[int]:
        known = self._known.get(inode)
        return self._asked(inode) if known is None else (known,)

    def _asked(self, inode: int) -> Iterator[int]:
        low, high = (inode, btrfs.INODE_REF_KEY, 0), (inode, btrfs.INODE_EXTREF_KEY, _ANY)
        for item in btrfs.tree_search(self._top, low, high):
            if item.type == btrfs.INODE_REF_KEY:
                yield item.offset
                continue
            at = 0
            while at < len(item.data):
                directory, _, length = _EXTREF.unpack_from(item.data, at)
                yield directory
                at += _EXTREF.size + length
