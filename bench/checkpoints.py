"""Checkpoints, roll backs and squashes, against the bare system calls, `cp -al` and GNU tar.

Stores are not synced here (`--sync none`), as none of the yardsticks syncs; one row has the cost of
the default.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

from aufsd.kernel import syscalls
from aufsd.store.ids import LayerId
from aufsd.store.layout import Layout
from aufsd.union.backend import Union
from aufsd.union.branches import MountCall
from aufsd.union.choice import choose
from aufsd_client import Client
from bench.daemon import Daemon, Line, daemon, request, require_result
from bench.figures import Outcome, compare
from bench.harness import Bench, Case, interleaved, seconds
from bench.mounts import make_chain

_FEW, _MANY = 10, 50_000
_TOGETHER = 64


def _fill(path: Path, files: int) -> None:
    for number in range(files):
        at = path / f"d{number // 1000}"
        if number % 1000 == 0:
            at.mkdir(exist_ok=True)
        (at / f"f{number}").write_bytes(b"x" * 100)


def changed_files(bench: Bench) -> Iterator[Outcome]:
    """A mounted layer with few changed files, and one with many."""
    many = _MANY // 10 if bench.quick else _MANY
    with daemon(bench.work / "aufsd", "--sync", "none") as running, running.client() as client:
        client.create("base")

        def side(id: str, files: int) -> Callable[[], float]:
            client.create(id, parent="base")
            _fill(Path(client.get(id).path), files)
            numbers = count()

            def measure() -> float:
                # what was written before is not what a checkpoint costs
                os.sync()
                took = seconds(lambda: client.checkpoint(id, f"{id}-{next(numbers)}"))
                # the files are its own again
                client.put(id)
                client.squash(id, "base")
                client.get(id)
                return took

            return measure

        found = interleaved(
            {"aufsd": side("many", many), f"{_FEW} files": side("few", _FEW)}, bench.rounds(15)
        )
    text = f"checkpoint of a mounted layer with {many:,} changed files"
    yield compare("checkpoint-files", text, found, f"{_FEW} files", goal=1.1)


class _Bare:
    """The system calls of a checkpoint, or of a roll back, on a chain of its own, and back."""

    def __init__(self, running: Daemon, top: str, lowers: list[LayerId]) -> None:
        layout = Layout(str(running.root))
        backend = choose("overlay", "", layout).backend
        self._content, self._below = layout.content(LayerId(top)), layout.content(LayerId("bare-x"))
        self._target = layout.mount_point(LayerId(top))
        under = tuple(map(layout.content, lowers))
        work = layout.work(LayerId(top))
        os.makedirs(work, exist_ok=True)
        os.makedirs(self._below)
        longer = Union(top, self._content, (self._below, *under), self._target, work)
        same = Union(top, self._content, under, self._target, work)
        self._calls = {True: backend.plan(longer), False: backend.plan(same)}
        os.rmdir(self._below)
        self._mount(longer=False)

    def _mount(self, *, longer: bool) -> None:
        for call in self._calls[longer]:
            _make(call)

    def measure(self, *, longer: bool) -> float:
        """umount2, rename, mkdir, mount; with the chain longer by one, or as it was."""
        began = time.perf_counter()
        syscalls.umount2(self._target, syscalls.UMOUNT_NOFOLLOW)
        os.rename(self._content, self._below)
        os.mkdir(self._content)
        self._mount(longer=longer)
        took = time.perf_counter() - began
        syscalls.umount2(self._target, syscalls.UMOUNT_NOFOLLOW)
        os.rmdir(self._content)
        os.rename(self._below, self._content)
        self._mount(longer=False)
        return took

    def close(self) -> None:
        """Unmount it."""
        syscalls.umount2(self._target, syscalls.UMOUNT_NOFOLLOW)


def _make(call: MountCall) -> None:
    if not call.by_number:
        data = call.render(call.dirs)
        syscalls.mount("none", call.target, call.fstype, call.flags, data)
        return
    opened = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in call.dirs]
    before = os.getcwd()
    os.chdir("/proc/self/fd")
    try:
        syscalls.mount("none", call.target, call.fstype, call.flags, call.render(opened))
    finally:
        os.chdir(before)
        for fd in opened:
            os.close(fd)


def chains(bench: Bench) -> Iterator[Outcome]:
    """Of a mounted layer on chains of several lengths."""
    with daemon(bench.work / "aufsd", "--sync", "none") as running, running.client() as client:
        for length in (1, 20, 100):
            top, other = f"ours{length}", f"bare{length}"
            lowers = make_chain(running, length, top, other)
            client.get(top)
            with (
                closing(_Bare(running, other, lowers)) as bare,
                closing(Line(running.socket)) as line,
            ):
                for verb in ("checkpoint", "rollback"):
                    ours = partial(_measured, client, line, top, verb)
                    theirs = partial(bare.measure, longer=verb == "checkpoint")
                    found = interleaved(
                        {
                            "aufsd": partial(_middle, ours),
                            "the bare calls": partial(_middle, theirs),
                        },
                        bench.rounds(21),
                        warm=2,
                    )
                    text = f"{verb} of a mounted layer, chain of {length}, p50"
                    yield compare(f"{verb}-{length}", text, found, "the bare calls", goal=1.5)
            client.put(top)


def _middle(measure: Callable[[], float]) -> float:
    return median(measure() for _ in range(9))


def _measured(client: Client, line: Line, top: str, verb: str) -> float:
    parent = client.get_metadata(top).metadata["parents"].split(" ")[0]
    if verb == "rollback":
        asked = request("rollback", id=top)
        return seconds(lambda: require_result(line.ask(asked)))
    asked = request("checkpoint", **{"id": top, "as": "measured"})
    took = seconds(lambda: require_result(line.ask(asked)))
    client.rollback(top, to=parent)
    client.remove("measured")
    return took


def together(bench: Bench) -> Iterator[Outcome]:
    """Many sandboxes that checkpoint at once, each by a connection of its own; calls a second."""
    with daemon(bench.work / "aufsd", "--sync", "none") as running, running.client() as client:
        client.create("base")
        ids = [f"s{number}" for number in range(_TOGETHER)]
        for id in ids:
            client.create(id, parent="base")
            client.get(id)
        names = count()

        def work(id: str, calls: int) -> None:
            with running.client() as own:
                for _ in range(calls):
                    own.checkpoint(id, f"c{next(names)}")
                    own.rollback(id, to="base")

        def rate(users: int, calls: int) -> float:
            with ThreadPoolExecutor(users) as pool:
                took = seconds(lambda: list(pool.map(lambda id: work(id, calls), ids[:users])))
            with running.client() as own:
                for row in own.iter_layers(prefix="c"):
                    own.remove(row.id)
            return 2 * users * calls / took

        sides = {"aufsd": partial(rate, _TOGETHER, 4), "one client": partial(rate, 1, 64)}
        found = interleaved(sides, bench.rounds(11))
    text = f"checkpoint and rollback, {_TOGETHER} sandboxes at once, calls per second"
    yield compare("checkpoint-together", text, found, "one client", unit="calls/s")


def squashes(bench: Bench) -> Iterator[Outcome]:
    """Twenty layers of a thousand files each into one."""
    layers, files = 20, 100 if bench.quick else 1000
    with daemon(bench.work / "aufsd", "--sync", "none") as running, running.client() as client:
        client.create("base")
        rounds, numbers = bench.rounds(11), count()

        def chain() -> tuple[str, list[Path]]:
            top = f"t{next(numbers)}"
            client.create(top, parent="base")
            path = Path(client.get(top).path)
            for number in range(layers):
                (path / f"l{number}").mkdir()
                for file in range(files):
                    (path / f"l{number}" / f"f{file}").write_bytes(b"x")
                client.checkpoint(top, f"{top}-{number}")
            client.put(top)
            return top, [running.root / f"diff/{top}-{number}" for number in range(layers)]

        made = [chain() for _ in range(rounds + 1)]
        os.sync()
        waiting = iter(made)
        copies = iter(made)

        def ours() -> float:
            top, _ = next(waiting)
            return seconds(lambda: client.squash(top, "base"))

        def theirs() -> float:
            _, paths = next(copies)
            target = bench.work / "copy"
            # of one that is not squashed yet, or not any more: then of what it became
            existing = [path for path in paths if path.exists()] or [
                running.root / f"diff/{paths[0].name.partition('-')[0]}"
            ]
            target.mkdir()
            command = ["cp", "-al", *(f"{path}/." for path in existing), str(target)]
            took = seconds(lambda: subprocess.run(command, check=True))
            shutil.rmtree(target)
            return took

        found = interleaved({"aufsd": ours, "cp -al": theirs}, rounds)
    text = f"squash of {layers} layers of {files:,} files"
    yield compare("squash", text, found, "cp -al", goal=0.5)


def saved(bench: Bench) -> Iterator[Outcome]:
    """Keeping what a thousand changed files hold: a checkpoint, and a tar of them."""
    with daemon(bench.work / "aufsd") as running, running.client() as client:
        client.create("base")
        client.create("top", parent="base")
        _fill(Path(client.get("top").path), 1000)
        numbers = count()

        def ours() -> float:
            os.sync()
            took = seconds(lambda: client.checkpoint("top", f"c{next(numbers)}"))
            client.put("top")
            client.squash("top", "base")
            client.get("top")
            return took

        def theirs() -> float:
            command = ["tar", "-C", str(running.root / "diff/top"), "-cf", "-", "."]
            with (bench.work / "tar").open("wb") as out:
                return seconds(lambda: subprocess.run(command, stdout=out, check=True))

        found = interleaved({"aufsd": ours, "tar": theirs}, bench.rounds(15))
    text = "checkpoint of 1,000 changed files, synced"
    yield compare("checkpoint-saved", text, found, "tar")


CASES = (
    Case("checkpoint-chains", chains),
    Case("checkpoint-files", changed_files),
    Case("checkpoint-together", together),
    Case("checkpoint-saved", saved),
    Case("squash", squashes),
)
