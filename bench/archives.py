"""Layers as tars, both ways, against GNU tar and containers-storage; and the list of changes."""

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from aufsd.kernel import syscalls
from aufsd_client import Client
from bench.daemon import Daemon, Line, daemon, request, require_result
from bench.figures import Curve, Figure, Outcome, alone, compare
from bench.harness import Bench, Case, interleaved, seconds, typical
from bench.peers import Peers

# the same work as aufsd does: PAX, in order of names, owners as numbers, xattrs kept
TAR_OUT = ("tar", "--format=posix", "--sort=name", "--numeric-owner", "--xattrs", "-cf", "-")
TAR_IN = ("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", "-")


@contextmanager
def drained() -> Iterator[int]:
    """The writing end of a pipe whose other end a thread moves to nowhere, without a copy."""
    read, write = os.pipe()
    nowhere = os.open(os.devnull, os.O_WRONLY)

    def drain() -> None:
        while os.splice(read, nowhere, 1 << 20):
            pass

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield write
    finally:
        os.close(write)
        thread.join()
        os.close(read)
        os.close(nowhere)


@dataclass(frozen=True, slots=True)
class Ours:
    """Layers in a daemon's store.

    What is unpacked stays until the case ends: ground.py says what deleting does to who comes next.
    """

    client: Client
    numbers: "count[int]"

    def apply(self, tar: Path) -> float:
        """Unpack into a new base layer, which is made outside of the time."""
        id = f"apply{next(self.numbers)}"
        self.client.create(id)
        with tar.open("rb") as source:
            settle(source.fileno())
            return seconds(lambda: self.client.apply_diff(id, source))

    def diff(self, id: str) -> float:
        """Pack into a pipe."""
        with drained() as out, os.fdopen(os.dup(out), "wb") as file:
            return seconds(lambda: self.client.diff(id, file))


@dataclass(frozen=True, slots=True)
class Storage:
    """Layers in a store of containers-storage."""

    directory: Path
    numbers: "count[int]"

    def run(self, *arguments: str, out: int | None = None) -> None:
        """One command; it has to succeed."""
        command = [
            *("containers-storage", arguments[0], "--storage-driver", "overlay"),
            *("--graph", f"{self.directory}/graph", "--run", f"{self.directory}/run"),
        ]
        sink = subprocess.DEVNULL if out is None else out
        subprocess.run([*command, *arguments[1:]], stdout=sink, stderr=subprocess.PIPE, check=True)

    def apply(self, tar: Path) -> float:
        """As Ours.apply."""
        id = f"apply{next(self.numbers)}"
        self.run("create-layer", "--id", id)
        with tar.open("rb") as source:
            settle(source.fileno())
        return seconds(lambda: self.run("applydiff", "--file", str(tar), id))

    def load(self, id: str, tar: Path) -> None:
        """A layer that stays, for `diff`."""
        self.run("create-layer", "--id", id)
        self.run("applydiff", "--file", str(tar), id)

    def diff(self, id: str) -> float:
        """As Ours.diff."""
        with drained() as out:
            return seconds(lambda: self.run("diff", "--uncompressed", id, out=out))


def settle(fd: int) -> None:
    """Have what the round before wrote written out: nobody pays for another's dirty pages."""
    syscalls.syncfs(fd)


def tar_in(tar: Path, directory: Path) -> float:
    """GNU tar unpacks into a new directory below `directory`."""
    directory.mkdir(exist_ok=True)
    command = [*TAR_IN, "-C", tempfile.mkdtemp(dir=directory)]
    with tar.open("rb") as source:
        settle(source.fileno())
        return seconds(lambda: subprocess.run(command, stdin=source, check=True))


def tar_out(directory: Path) -> float:
    """GNU tar packs a directory into a pipe."""
    with drained() as out:
        command = [*TAR_OUT, "-C", str(directory), "."]
        return seconds(lambda: subprocess.run(command, stdout=out, check=True))


@contextmanager
def sides(bench: Bench) -> Iterator[tuple[Daemon, Ours, Storage | None]]:
    """A daemon that syncs nothing, as the others do not, and a store of the peer."""
    numbers = count()
    with daemon(bench.work / "aufsd", "--sync", "none") as running, running.client() as client:
        storage = Storage(bench.work / "storage", numbers)
        yield running, Ours(client, numbers), storage if _has_storage(bench.peers) else None


def _has_storage(peers: Peers) -> bool:
    return "containers-storage" in peers


def _missing(bench: Bench) -> str:
    return bench.peers.missing.get("containers-storage", "")


def both_ways(name: str, what: str, tar: Path, bench: Bench, rounds: int) -> Iterator[Figure]:
    """diff and apply_diff of one archive against both peers."""
    with sides(bench) as (running, ours, storage):
        ours.client.create("kept")
        ours.client.apply_diff("kept", str(tar))
        content = running.root / "diff" / "kept"
        out = {"aufsd": lambda: ours.diff("kept"), "tar": lambda: tar_out(content)}
        into = {
            "aufsd": lambda: ours.apply(tar),
            "tar": lambda: tar_in(tar, bench.work / "unpacked"),
        }
        if storage is not None:
            peer = storage
            peer.load("kept", tar)
            out["containers-storage"] = lambda: peer.diff("kept")
            into["containers-storage"] = lambda: peer.apply(tar)
        found = interleaved(out, bench.rounds(rounds))
        text = f"diff of {what} to a pipe"
        yield compare(f"{name}-diff", text, found, "tar", goal=1.2)
        yield compare(
            f"{name}-diff", text, found, "containers-storage", goal=0.35, missing=_missing(bench)
        )
        found = interleaved(into, bench.rounds(rounds))
        text = f"apply_diff of {what}"
        yield compare(f"{name}-apply", text, found, "tar", goal=1.3)
        yield compare(
            f"{name}-apply", text, found, "containers-storage", goal=0.5, missing=_missing(bench)
        )


def debian(bench: Bench) -> Iterator[Outcome]:
    """A Debian root, as the demonstration builds it."""
    from demo.demo import CACHE, root_tar

    tar = root_tar(bench.work)
    what = "a Debian root" if tar == CACHE else "this machine's own files, for want of a root"
    yield from both_ways("debian", what, tar, bench, 9)


def small_files(bench: Bench) -> Iterator[Outcome]:
    """Many small files."""
    number = 5000 if bench.quick else 50_000
    tree = bench.work / "tree"
    grow(tree, number)
    tar = pack(tree, bench.work / "small.tar")
    yield from both_ways("small-files", f"{number:,} files of 1 KB", tar, bench, 7)


def one_file(bench: Bench) -> Iterator[Outcome]:
    """A layer that holds one small file: what a call costs before it moves anything."""
    tree = bench.work / "tree"
    grow(tree, 1)
    tar = pack(tree, bench.work / "one.tar")
    with sides(bench) as (_, ours, storage):
        ours.client.create("kept")
        ours.client.apply_diff("kept", str(tar))
        out = {"aufsd": lambda: ours.diff("kept")}
        into = {"aufsd": lambda: ours.apply(tar)}
        if storage is not None:
            peer = storage
            peer.load("kept", tar)
            out["containers-storage"] = lambda: peer.diff("kept")
            into["containers-storage"] = lambda: peer.apply(tar)
        for verb, measured in (("diff", out), ("apply_diff", into)):
            name, text = f"one-file-{verb[:5].rstrip('_')}", f"{verb} of a one-file layer, p50"
            found = interleaved(measured, bench.rounds(60), warm=3)
            yield compare(
                name, text, found, "containers-storage", goal=0.5, missing=_missing(bench)
            )
            yield alone(name, text, found["aufsd"], goal=0.005)


def changes(bench: Bench) -> Iterator[Outcome]:
    """The list of changes costs what the layer holds, and not what stands below it."""
    small, large = (1000, 10_000) if bench.quick else (1000, 100_000)
    with sides(bench) as (running, ours, _):
        client = ours.client
        measured: dict[str, Callable[[], float]] = {}
        for number in (small, large):
            base, top = f"base{number}", f"top{number}"
            client.create(base)
            grow(running.root / "diff" / base, number)
            client.create(top, parent=base)
            with client.mounted(top) as path:
                for directory in range(10):
                    Path(path, f"d{directory}", "f0").write_bytes(b"changed")
            assert len(client.changes(top).changes) == 10, "what is measured is not what is meant"
            ask = _asking(running, top)
            measured[f"{number:,} files"] = partial(typical, ask, 5)
        found = interleaved(measured, bench.rounds(15))
        yield compare(
            "changes",
            f"changes of a 10-file layer on {large:,} files",
            found,
            f"{small:,} files",
            ours=f"{large:,} files",
            goal=1.1,
        )


def _asking(running: Daemon, id: str) -> Callable[[], object]:
    line, text = Line(running.socket), request("changes", id=id)
    return lambda: require_result(line.ask(text))


def growth(bench: Bench) -> Iterator[Outcome]:
    """What files in a layer cost, both ways, for the chart."""
    numbers = (1, 100, 1000) if bench.quick else (1, 100, 1000, 10_000, 50_000)
    points: dict[str, list[tuple[float, float]]] = {}
    with sides(bench) as (running, ours, _):
        for number in numbers:
            tree = bench.work / f"tree{number}"
            grow(tree, number)
            tar = pack(tree, bench.work / f"{number}.tar")
            id = f"kept{number}"
            ours.client.create(id)
            ours.client.apply_diff(id, str(tar))
            content = running.root / "diff" / id
            measured = {
                "diff": partial(ours.diff, id),
                "apply_diff": partial(ours.apply, tar),
                "tar -c": partial(tar_out, content),
                "tar -x": partial(tar_in, tar, bench.work / "x"),
            }
            for name, values in interleaved(measured, bench.rounds(5)).items():
                points.setdefault(name, []).append((number, sorted(values)[len(values) // 2]))
    for name, line in points.items():
        yield Curve(panel="files in a layer", name=name, points=tuple(line))


def grow(tree: Path, number: int, size: int = 1024) -> None:
    """So many files of `size` bytes each, at most 100 in a directory of their own."""
    for first in range(0, number, 100):
        directory = tree / f"d{first // 100}"
        directory.mkdir(parents=True)
        for index in range(min(100, number - first)):
            (directory / f"f{index}").write_bytes(os.urandom(size))


def pack(tree: Path, tar: Path) -> Path:
    """A tree as a tar; the tree goes."""
    with tar.open("wb") as out:
        subprocess.run([*TAR_OUT, "-C", str(tree), "."], stdout=out, check=True)
    shutil.rmtree(tree)
    return tar


CASES = (
    Case("debian", debian),
    Case("small-files", small_files),
    Case("one-file", one_file),
    Case("changes", changes),
    Case("growth-files", growth),
)
