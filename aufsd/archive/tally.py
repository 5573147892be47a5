"""What a layer holds while it is being written, held against the limits."""

import math
import os

from aufsd.archive.measure import measure
from aufsd.archive.requests import Limits
from aufsd.archive.tree import Tree
from aufsd.store.dialect import Dialect
from aufsd_client.errors import LimitExceeded


class Tally:
    """Counts what is made. What was taken away in between is found out only where it matters."""

    def __init__(self, limits: Limits, tree: Tree) -> None:
        self._limits = limits
        self._tree = tree
        # a layer that holds its parents' content too is measured by who knows those
        self._measurable = tree.dialect is not Dialect.NONE
        self._bytes = self._entries = 0
        self._most_bytes = limits.bytes or math.inf
        self._most_entries = limits.entries or math.inf
        if not tree.fresh:
            self._recount(0)

    def add(self, entries: int, size: int = 0) -> None:
        """Count what has just been made, and the `size` that it will have. Raises LimitExceeded."""
        self._entries += entries
        self._bytes += size
        if self._bytes > self._most_bytes or self._entries > self._most_entries:
            self._judge(size)

    def room(self) -> tuple[float, float]:
        """How many entries and bytes are left up to the limits, by what is counted."""
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
        """Look at what is there; the last file has no content yet, and will have `size`."""
        if not self._measurable:
            return
        here = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.chdir(b"/")
        found = measure(aufs=self._tree.dialect is Dialect.AUFS)
        self._bytes, self._entries = found.bytes + size, found.entries
        os.fchdir(here)
        os.close(here)
