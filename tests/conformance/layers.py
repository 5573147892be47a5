"""Layers written by hand, in the dialect of the backend that will mount them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from aufsd.kernel import mountinfo, syscalls
from aufsd.store.dialect import Dialect
from aufsd.store.ids import LayerId
from aufsd.store.layout import Layout
from aufsd.union.backend import Backend, Union, Verdict
from aufsd.union.choice import PROBES
from tests.conformance import snapshots


@dataclass
class Layers:
    """Layers of one store, each a directory; `union` puts them together."""

    layout: Layout
    backend: Backend
    count: int = field(default=0)

    def add(self, files: dict[str, str] | None = None, *, id: str = "") -> str:
        """A new layer with these files (a name with a slash at its end: a directory); its id."""
        self.count += 1
        id = id or f"layer-{self.count}"
        os.makedirs(self.content(id))
        os.makedirs(self.layout.mount_point(LayerId(id)))
        for name, text in (files or {}).items():
            self.write(id, name, text)
        return id

    def content(self, id: str) -> str:
        """The layer's directory."""
        return self.layout.content(LayerId(id))

    def write(self, id: str, name: str, text: str) -> None:
        """A file, or a directory if the name ends in a slash, with the directories above it."""
        path = f"{self.content(id)}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not name.endswith("/"):
            Path(path).write_text(text)

    def delete(self, id: str, name: str) -> None:
        """A whiteout of `name`."""
        path = Path(self.content(id), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.backend.dialect is Dialect.OVERLAY:
            os.mknod(path, 0o020000, os.makedev(0, 0))
        else:
            (path.parent / f".wh.{path.name}").touch()

    def make_opaque(self, id: str, name: str = "") -> None:
        """Have the directory hide what lies below it."""
        path = Path(self.content(id), name)
        path.mkdir(parents=True, exist_ok=True)
        if self.backend.dialect is Dialect.OVERLAY:
            os.setxattr(path, f"{self.backend.namespace}.overlay.opaque", b"y")
        else:
            (path / ".wh..wh..opq").touch()

    def union(self, *ids: str, read_only: bool = False) -> Union:
        """The layers as one union, topmost first."""
        return Union(
            id=ids[0],
            top=self.content(ids[0]),
            lowers=tuple(self.content(id) for id in ids[1:]),
            target=self.layout.mount_point(LayerId(ids[0])),
            work=self.layout.work(LayerId(ids[0])),
            read_only=read_only,
        )

    def need_exclusive(self) -> None:
        """Skip a test where the kernel does not tell that a writable branch is in use."""
        if dict(self.backend.facts)["upper_in_use"] == "unseen":
            pytest.skip("in a user namespace overlayfs has no index, and tells nothing")

    def mount(self, *ids: str, read_only: bool = False) -> Union:
        """Mount that union; the store's fixture unmounts what is left.

        Without unions the layers become snapshots, and the topmost is what shows.
        """
        union = self.union(*ids, read_only=read_only)
        if self.backend.snapshots:
            snapshots.stack((union.top, *union.lowers), read_only=read_only)
            return replace(union, target=union.top)
        self.backend.mount(union)
        return union

    def unmount(self, union: Union) -> None:
        """Unmount it again, if it was mounted."""
        if not self.backend.snapshots:
            self.backend.unmount(union.target)

    def mount_again(self, union: Union) -> None:
        """Unmount it, and mount it as before."""
        if not self.backend.snapshots:
            self.backend.unmount(union.target)
            self.backend.mount(union)


@contextmanager
def open_layers(name: str, root: str) -> Iterator[Layers]:
    """A store at `root` served by the backend `name`, unmounted in the end."""
    os.makedirs(root, exist_ok=True)
    layout = Layout(root)
    backend = PROBES[name](layout)
    assert not isinstance(backend, Verdict), backend.reason
    try:
        yield Layers(layout, backend)
    finally:
        for row in reversed(mountinfo.mounted_under(root)):
            # a union that a process serves has to see that one end
            served = row.fstype.startswith("fuse.")
            (backend.unmount if served else syscalls.umount2)(row.mount_point)


def tree(root: str) -> dict[str, str]:
    """Every name below `root` with the text of files; directories end in a slash."""
    found: dict[str, str] = {}
    for directory, names, files in os.walk(root):
        below = os.path.relpath(directory, root).removeprefix(".")
        prefix = f"{below}/" if below else ""
        found |= {f"{prefix}{name}/": "" for name in names}
        found |= {f"{prefix}{name}": Path(directory, name).read_text() for name in files}
    return found
