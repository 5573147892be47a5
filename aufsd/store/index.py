"""Reads the index from disk: the parents of each layer, and which layers are damaged.

A layer's parents are only in its parents file. So the file is checked in two ways. After the first
parent it must go on as that parent's own file. And it must not be empty if the layer's content has
the mark of a parent. A power cut can empty a file that was never synced (containers/storage#1064,
moby#35747), and that would silently turn a layer into a base layer.
"""

import errno
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from aufsd.store.ids import LayerId, is_id
from aufsd.store.layout import Layout

# on diff/<id>: the parent at its creation; layers that aufsd did not make have no such mark
PARENT_XATTR = "aufsd.parent"
_NO_PARENT = "-"
# bytes of a parents file: 201 a line, and more lines than any kernel has branches
_LONGEST = 1 << 22

Record = tuple[str, ...] | str


@dataclass(frozen=True, slots=True)
class Index:
    """`parent` is None for a base layer; `damaged` says what is wrong with a layer.

    `below` has the intact parent that a damaged layer names, so that it is not removed.
    """

    parent: dict[LayerId, LayerId | None] = field(default_factory=dict)
    damaged: dict[LayerId, str] = field(default_factory=dict)
    below: dict[LayerId, LayerId] = field(default_factory=dict)
    # when the parents file of each layer was first written
    created: dict[LayerId, float] = field(default_factory=dict)
    # layers with a read-only parents file
    sealed: set[LayerId] = field(default_factory=set)

    def children(self) -> dict[LayerId, set[LayerId]]:
        """The children of each layer."""
        found: dict[LayerId, set[LayerId]] = {}
        for id, above in (*self.parent.items(), *self.below.items()):
            if above is not None:
                found.setdefault(above, set()).add(id)
        return found


def read_index(layout: Layout, namespace: str) -> Index:
    """Read every parents file once. Raises OSError only if a directory cannot be listed."""
    with os.scandir(layout.layers) as entries:
        ids = [
            LayerId(entry.name)
            for entry in entries
            if is_id(entry.name) and entry.is_file(follow_symlinks=False)
        ]
    with os.scandir(layout.diff) as entries:
        contents = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    sound: dict[LayerId, bool] = {}
    index = Index()
    records = {id: _record(layout, namespace, id, contents, index) for id in ids}
    for id in ids:
        _judge(id, records, sound, index.damaged)
    for id, record in records.items():
        if sound[id]:
            index.parent[id] = LayerId(record[0]) if record else None
        elif (above := _said_parent(layout, namespace, id)) and sound.get(above):
            index.below[id] = above
    return index


def _record(
    layout: Layout, namespace: str, id: LayerId, contents: Collection[str], index: Index
) -> Record:
    if id not in contents:
        return "its content directory is missing"
    try:
        parents, found = read_record(layout.parents_file(id))
    except OSError as error:
        return f"its parents file cannot be read: {error.strerror}"
    index.created[id] = found.st_mtime
    if is_sealed(found):
        index.sealed.add(id)
    if parents == () and (made_on := read_parent_mark(layout.content(id), namespace)):
        return f"its parents file is empty, and it was made on {made_on}"
    return parents


def _said_parent(layout: Layout, namespace: str, id: LayerId) -> LayerId | None:
    """The parent of a damaged layer, by its file, or else by its mark."""
    try:
        parents = read_parents(layout.parents_file(id))
    except OSError:
        parents = ()
    if parents and not isinstance(parents, str):
        return LayerId(parents[0])
    return read_parent_mark(layout.content(id), namespace)


def parent_mark(parent: LayerId | None, namespace: str) -> dict[str, bytes]:
    """The xattr with the parent of a layer."""
    return {f"{namespace}.{PARENT_XATTR}": (parent or _NO_PARENT).encode()}


def read_parent_mark(content: str, namespace: str) -> LayerId | None:
    """The parent in a layer's mark; None for a base layer or without a mark."""
    try:
        text = os.getxattr(content, f"{namespace}.{PARENT_XATTR}").decode("ascii", "replace")
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP, errno.ENOENT, errno.ENOTDIR):
            return None
        raise
    return LayerId(text) if is_id(text) else None


def read_parents(path: str) -> Record:
    """The parents in the file, nearest first; or a str that says what is wrong with it."""
    return read_record(path)[0]


def is_sealed(parents_file: os.stat_result) -> bool:
    """Whether a layer is sealed: its parents file is read-only (seals.py)."""
    return not parents_file.st_mode & stat.S_IWUSR


def read_record(path: str) -> tuple[Record, os.stat_result]:
    """What the parents file lists, as `read_parents`; and the file."""
    # O_NONBLOCK: the open of a fifo would wait
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return "its parents file is no file", found
        if found.st_size > _LONGEST:
            return f"its parents file is of more than {_LONGEST} bytes", found
        text = os.read(fd, _LONGEST)
    finally:
        os.close(fd)
    return _parse(text), found


def _parse(text: bytes) -> Record:
    if not text:
        return ()
    try:
        lines = text.decode("ascii").split("\n")
    except UnicodeDecodeError:
        return "its parents file is not text"
    # Docker's driver skips blank lines (dirs.go, getParentIds)
    parents = tuple(line for line in lines if line)
    if not all(map(is_id, parents)):
        return "its parents file names something that is not a layer id"
    return parents


def _judge(
    id: LayerId,
    records: Mapping[LayerId, Record],
    sound: dict[LayerId, bool],
    damaged: dict[LayerId, str],
) -> None:
    """Check that a layer's chain is consistent. Without recursion."""
    pending = [id]
    while pending:
        current = pending[-1]
        if current in sound:
            pending.pop()
            continue
        parents = records[current]
        problem = ""
        if isinstance(parents, str):
            problem = parents
        elif parents:
            above = LayerId(parents[0])
            if above not in records:
                problem = f"its parent {above} does not exist"
            elif above in pending:
                problem = f"its parents go in a circle through {above}"
            elif above not in sound:
                pending.append(above)
                continue
            elif not sound[above]:
                problem = f"its parent {above} is damaged"
            elif records[above] != parents[1:]:
                problem = f"its parents file does not continue as that of its parent {above}"
        sound[current] = not problem
        if problem:
            damaged[current] = problem
        pending.pop()
