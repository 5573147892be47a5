"""Counts the entries and bytes of a layer that is being written, against the limits."""

import math
import os

from aufsd.archive.measure import measure
from aufsd.archive.requests import Limits
from aufsd.archive.tree import Tree
from aufsd.store.dialect import Dialect
from aufsd_client.errors import LimitExceeded


class Tally:
    """Counts what is made. Deleted entries are subtracted only when a limit is reached."""

    def __init__(self, limits: Limits, tree: Tree) -> None:
        self._limits = limits
        self._tree = tree
        # for a layer that also holds its parents' content, the caller measures
        self._measurable = tree.dialect is not Dialect.NONE
        self._bytes = self._entries = 0
        self._most_bytes = limits.bytes or math.inf
        self._most_entries = limits.entries or math.inf
        if not tree.fresh:
            self._recount(0)

    def add(self, entries: int, size: int = 0) -> None:
        """Count a new entry that will have `size` bytes. Raises LimitExceeded."""
        self._entries += entries
        self._bytes += size
        if self._bytes > self._most_bytes or self._entries > self._most_entries:
            self._judge(size)

    def room(self) -> tuple[float, float]:
        """Entries and bytes that are left up to the limits."""
        return self._most_entries - self._entries, self._most_bytes - self._bytes

    def total(self) -> int:
        """Bytes of the layer's regular files, each inode once."""
        if self._tree.removed or not self._tree.fresh:
            self._recount(0)
        return self._bytes

    def _judge(self, size: int) -> None:
        if self._tree.removed:
            self._recount(size)
        most = self._limits
        for what, has, may in (
            ("bytes", self._bytes, most.bytes),
            ("entries", self._entries, most.entries),
        ):
            if may and has > may:
                raise LimitExceeded(f"the layer would hold more than {may} {what}", limit=may)

    def _recount(self, size: int) -> None:
        """Count again what is on disk. The last file is still empty, and will have `size` bytes."""
        if not self._measurable:
            return
        here = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.chdir(b"/")
        found = measure(aufs=self._tree.dialect is Dialect.AUFS)
        self._bytes, self._entries = found.bytes + size, found.entries
        os.fchdir(here)
        os.close(here)
