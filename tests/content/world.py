"""A daemon and a model of what its layers hold, changed together at random, and compared."""

import errno
import itertools
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from aufsd_client import Client
from tests.content.tree import Directory, File, Names, expected, seen
from tests.daemon import Daemon

_NAMES = ("a", "b", "c", "d")
# layers that may be written to, and those on one chain, at most
_WORKING, _CHAIN = 4, 12


@dataclass
class Layer:
    """A layer as it should be. `epochs` are those of its own content; the highest is now."""

    parent: str
    shows: Directory
    epochs: set[int]
    sealed: bool = False
    mounted: bool = False


@dataclass
class World:
    """`whole`: layers are snapshots. `links`: hard links and times can be relied on."""

    daemon: Daemon
    chosen: random.Random
    whole: bool
    links: bool
    layers: dict[str, Layer] = field(default_factory=dict)
    serial: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    clients: list[Client] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    @property
    def client(self) -> Client:
        return self.clients[-1]

    def begin(self) -> None:
        """The first layers."""
        self.clients.append(self.daemon.client())
        for id, parent in (("base", ""), ("w", "base")):
            self.create(id, parent)

    def create(self, id: str, parent: str) -> None:
        self.client.create(id, parent=parent)
        shows = self.layers[parent].shows.copied() if parent else Directory()
        self.layers[id] = Layer(parent, shows, {next(self.serial)})

    def chain(self, id: str) -> list[str]:
        found = []
        while id:
            found.append(id)
            id = self.layers[id].parent
        return found

    def children(self, id: str) -> list[str]:
        return [other for other, layer in self.layers.items() if layer.parent == id]

    def working(self) -> list[str]:
        return [id for id, row in self.layers.items() if not row.sealed and not self.children(id)]

    # --- one step -----------------------------------------------------------------------------

    def step(self) -> None:
        """Something at random."""
        id = self.chosen.choice([each for each in self.working() if each != "base"])
        steps = (
            *[self.write] * 12,
            *(self.checkpoint, self.checkpoint, self.rollback, self.fork, self.squash, self.squash),
            *(self.put, self.remove, self.crash, self.diff, self.changes),
        )
        act = self.chosen.choice(steps)
        self.done.append(f"{act.__name__} {id}")
        act(id)

    def write(self, id: str) -> None:
        """A few changes through the mount."""
        layer = self.layers[id]
        if not layer.mounted:
            self.client.get(id)
            layer.mounted = True
        top = Path(self.client.get_metadata(id).metadata["path"])
        for _ in range(self.chosen.randrange(1, 5)):
            self._change(top, layer)

    def checkpoint(self, id: str) -> None:
        if len(self.chain(id)) < _CHAIN:
            self._checkpoint(id)

    def _checkpoint(self, id: str) -> str:
        layer, name = self.layers[id], f"c{next(self.serial)}"
        made = self.client.checkpoint(id, name)
        assert (made.parent, made.references) == (name, int(layer.mounted))
        self._freeze(id, name)
        return name

    def _freeze(self, id: str, name: str) -> None:
        layer = self.layers[id]
        self.layers[name] = Layer(layer.parent, layer.shows.copied(), layer.epochs, sealed=True)
        layer.parent, layer.epochs = name, {next(self.serial)}

    def rollback(self, id: str) -> None:
        layer = self.layers[id]
        sealed = [other for other, row in self.layers.items() if row.sealed]
        to = self.chosen.choice([*sealed, "", "base"])
        self.client.rollback(id, to=to)
        layer.parent = to or layer.parent
        layer.shows = self.layers[layer.parent].shows.copied()
        layer.epochs = {next(self.serial)}

    def fork(self, id: str) -> None:
        if len(self.working()) < _WORKING and len(self.chain(id)) < _CHAIN:
            name, new = f"c{next(self.serial)}", f"w{next(self.serial)}"
            self.client.fork(id, new, name)
            self._freeze(id, name)
            shows = self.layers[name].shows.copied()
            self.layers[new] = Layer(name, shows, {next(self.serial)})

    def squash(self, id: str) -> None:
        self.put(id)
        chain = self.chain(id)
        onto = self.chosen.choice([*chain[1:], chain[-1]])
        between = chain[1 : chain.index(onto)]
        gone: list[str] = []
        for each in between:
            if self.children(each) != [chain[len(gone)]]:
                break
            gone.append(each)
        done = self.client.squash(id, onto)
        assert (done.removed, done.kept) == (gone, between[len(gone) :])
        layer = self.layers[id]
        layer.parent = onto
        for each in between:
            layer.epochs = layer.epochs | self.layers[each].epochs
        layer.epochs.add(next(self.serial))
        for each in gone:
            del self.layers[each]

    def put(self, id: str) -> None:
        if self.layers[id].mounted:
            self.client.put(id)
            self.layers[id].mounted = False

    def remove(self, id: str) -> None:
        if len(self.working()) > 1 and id != "w":
            self.put(id)
            assert self.client.remove(id).removed
            del self.layers[id]

    def crash(self, id: str) -> None:
        """kill -9, and another daemon."""
        self.daemon.kill()
        self.daemon.start()
        self.clients.append(self.daemon.client())
        counts = {row.id: row.references for row in self.client.list().layers}
        assert counts == {each: int(row.mounted) for each, row in self.layers.items()}

    def diff(self, id: str) -> None:
        """Its tar, in a layer on the same parent, shows the same."""
        layer, out, copy = self.layers[id], bytearray(), f"d{next(self.serial)}"
        self.client.diff(id, out)
        self.client.create(copy, parent=layer.parent)
        self.client.apply_diff(copy, bytes(out))
        with self.client.mounted(copy) as path:
            # an archive has times to the nanosecond, and links of one layer only
            found = {name: row[:4] for name, row in seen(Path(path), times=False).items()}
        wanted = expected(layer.shows, times=False)
        assert found == {name: row[:4] for name, row in wanted.items()}
        self.client.remove(copy)

    def changes(self, id: str) -> None:
        """What is told of is what differs from the parent."""
        layer = self.layers[id]
        told = {str(each.path)[1:]: each.kind for each in self.client.iter_changes(id)}
        now = expected(layer.shows, times=True)
        then = expected(self.layers[layer.parent].shows, times=True)
        for path in {*now, *then}:
            # the last of a row is another name of the file, which may have gone
            same = now.get(path, ("",))[:5] == then.get(path, ("",))[:5]
            kind = told.get(path)
            if path not in now:
                gone = [path, *_above(path)]
                assert any(told.get(each) in ("delete", "modify") for each in gone), (path, told)
                assert kind in ("delete", None), (path, told)
            elif path not in then:
                assert kind == "add", (path, told)
            elif not same:
                assert kind == "modify", (path, told)

    # --- changes through the mount ------------------------------------------------------------

    def _change(self, top: Path, layer: Layer) -> None:
        tree, chosen = layer.shows, self.chosen
        places: list[Names] = [()]
        places += [names for names, node in tree.walk() if isinstance(node, Directory)]
        names: Names = (*chosen.choice(places), chosen.choice(_NAMES))
        path, node = top.joinpath(*names), tree.at(names)
        above = tree.directory(names[:-1])
        match chosen.choice(
            ("write",) * 4
            + ("delete", "mkdir", "replace", "rename", "rename")
            + ("link", "symlink", "chmod", "xattr")
        ):
            case "write" if node is None:
                made = File(max(layer.epochs))
                above.below[names[-1]] = made
                self._write(path, made, "xb")
            case "write" if isinstance(node, File) and node.kind == "file":
                self._write(path, self._own(layer, names), chosen.choice(("wb", "ab")))
            case "delete" if node is not None:
                _remove(path)
                del above.below[names[-1]]
            case "mkdir" if node is None:
                path.mkdir(mode=0o750)
                above.below[names[-1]] = Directory(0o750)
            case "replace" if isinstance(node, Directory):
                _remove(path)
                del above.below[names[-1]]
                path.mkdir()
                above.below[names[-1]] = Directory()
            case "rename" if node is not None:
                self._rename(top, layer, names)
            case "link" if isinstance(node, File) and self.links:
                other = f"{names[-1]}-link"
                if other not in above.below:
                    os.link(path, path.with_name(other), follow_symlinks=False)
                    above.below[other] = self._own(layer, names)
            case "symlink" if node is None:
                path.symlink_to("to")
                above.below[names[-1]] = File(max(layer.epochs), "symlink", b"to")
            case "chmod" if isinstance(node, Directory):
                path.chmod(0o711)
                node.mode = 0o711
            case "chmod" if isinstance(node, File) and node.kind == "file":
                path.chmod(0o600)
                self._own(layer, names).mode = 0o600
            case "xattr" if isinstance(node, File) and node.kind == "file":
                value = chosen.randbytes(4)
                os.setxattr(path, "user.note", value)
                self._own(layer, names).xattrs["user.note"] = value

    def _own(self, layer: Layer, names: Names) -> File:
        if self.whole:
            found = layer.shows.at(names)
            assert isinstance(found, File)
            return found
        return layer.shows.own(names, layer.epochs)

    def _write(self, path: Path, file: File, how: str) -> None:
        data = self.chosen.randbytes(self.chosen.randrange(3000))
        with path.open(how) as stream:
            stream.write(data)
        file.body = file.body + data if how == "ab" else data
        if self.links:
            file.mtime = 10**18 + next(self.serial)
            os.utime(path, ns=(0, file.mtime))

    def _rename(self, top: Path, layer: Layer, names: Names) -> None:
        tree, node = layer.shows, layer.shows.at(names)
        places = [()] + [each for each, one in tree.walk() if isinstance(one, Directory)]
        to = (*self.chosen.choice(places), self.chosen.choice(_NAMES))
        there = tree.at(to)
        if to[: len(names)] == names or there is node or isinstance(there, Directory):
            return
        if there is not None and isinstance(node, Directory):
            return
        try:
            top.joinpath(*names).rename(top.joinpath(*to))
        except OSError as error:
            # of a directory that layers below have too (overlayfs, redirect_dir)
            if error.errno != errno.EXDEV:
                raise
            return
        if isinstance(node, File):
            node = self._own(layer, names)
        assert node is not None
        del tree.directory(names[:-1]).below[names[-1]]
        tree.directory(to[:-1]).below[to[-1]] = node

    # --- compared -----------------------------------------------------------------------------

    def compare(self) -> None:
        """Every layer shows what it should."""
        for id, layer in self.layers.items():
            with self.client.mounted(id) as path:
                found = seen(Path(path), times=self.links)
            wanted = expected(layer.shows, times=self.links)
            if not self.links:
                found, wanted = ({k: v[:5] for k, v in one.items()} for one in (found, wanted))
            assert found == wanted, (id, self.done)
        rows = {row.id: (row.parent, row.sealed) for row in self.client.list().layers}
        assert rows == {id: (row.parent, row.sealed) for id, row in self.layers.items()}


def _above(path: str) -> list[str]:
    return [str(each) for each in Path(path).parents][:-1]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
