"""What a layer shows, in plain Python: names, what they lead to, and which names are one file.

A hard link of a layer below is broken when one of its names is changed: a union copies the file up
under that name alone. So each file knows in which epoch of which layer it was made, and a layer
which epochs its own content is of. On btrfs nothing is copied up, and no link is ever broken.
"""

import copy
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Names = tuple[str, ...]


@dataclass(eq=False)
class File:
    """A file that is no directory; `epoch` is when it was written last."""

    epoch: int
    kind: str = "file"
    body: bytes = b""
    mode: int = 0o644
    xattrs: dict[str, bytes] = field(default_factory=dict)
    mtime: int = 0


@dataclass(eq=False)
class Directory:
    """A directory."""

    mode: int = 0o755
    below: "dict[str, File | Directory]" = field(default_factory=dict)

    def at(self, names: Names) -> "File | Directory | None":
        """What is there."""
        here: File | Directory | None = self
        for name in names:
            here = here.below.get(name) if isinstance(here, Directory) else None
        return here

    def directory(self, names: Names) -> "Directory":
        """The directory that is there."""
        found = self.at(names)
        assert isinstance(found, Directory)
        return found

    def walk(self, above: Names = ()) -> "Iterator[tuple[Names, File | Directory]]":
        """All below, with its path."""
        for name, node in sorted(self.below.items()):
            yield (*above, name), node
            if isinstance(node, Directory):
                yield from node.walk((*above, name))

    def copied(self) -> "Directory":
        """The same once more; names of one file stay names of one."""
        return copy.deepcopy(self)

    def own(self, names: Names, epochs: set[int]) -> File:
        """The file there, for it to be changed: copied up first if it is of a layer below."""
        above = self.directory(names[:-1])
        found = above.below[names[-1]]
        assert isinstance(found, File)
        if found.epoch not in epochs:
            found = copy.copy(found)
            found.xattrs = dict(found.xattrs)
            found.epoch = max(epochs)
            above.below[names[-1]] = found
        return found


Row = tuple[object, ...]


def expected(tree: Directory, *, times: bool) -> dict[str, Row]:
    """What a walk of a view with this content finds."""
    first: dict[int, str] = {}
    found: dict[str, Row] = {}
    for names, node in tree.walk():
        path = "/".join(names)
        if isinstance(node, Directory):
            found[path] = ("directory", node.mode)
            continue
        same = first.setdefault(id(node), path)
        mode = 0o777 if node.kind == "symlink" else node.mode
        mtime = node.mtime if times and node.kind == "file" else 0
        found[path] = (node.kind, mode, node.body, node.xattrs, mtime, same)
    return found


def seen(top: Path, *, times: bool) -> dict[str, Row]:
    """The same of a directory."""
    first: dict[int, str] = {}
    found: dict[str, Row] = {}
    for path in sorted(top.rglob("*"), key=lambda path: path.relative_to(top).parts):
        info, name = path.lstat(), str(path.relative_to(top))
        if stat.S_ISDIR(info.st_mode):
            found[name] = ("directory", stat.S_IMODE(info.st_mode))
            continue
        same = first.setdefault(info.st_ino, name)
        kind, body = "file", b""
        if stat.S_ISLNK(info.st_mode):
            kind, body = "symlink", os.fsencode(os.readlink(path))
        else:
            body = path.read_bytes()
        xattrs = {
            each: os.getxattr(path, each, follow_symlinks=False)
            for each in os.listxattr(path, follow_symlinks=False)
            if each.startswith("user.") and kind == "file"
        }
        mtime = info.st_mtime_ns if times and kind == "file" else 0
        found[name] = (kind, stat.S_IMODE(info.st_mode), body, xattrs, mtime, same)
    return found
