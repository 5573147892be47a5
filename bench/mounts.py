"""`get` and `put` that mount and unmount, against the bare mount(2) and umount2(2)."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from hashlib import sha256
from statistics import median

from aufsd.kernel import syscalls
from aufsd.store.ids import LayerId
from aufsd.store.layout import Layout
from aufsd.union.backend import Union
from aufsd.union.branches import MountCall
from aufsd.union.choice import choose
from bench.daemon import Daemon, Line, daemon, request, require_result
from bench.figures import Curve, Outcome, compare
from bench.harness import Bench, Case, interleaved, typical


def name(text: str) -> LayerId:
    """A layer id of the usual length."""
    return LayerId(sha256(text.encode()).hexdigest())


def make_chain(running: Daemon, length: int, *tops: str) -> list[LayerId]:
    """Layers with `tops` standing on a chain of so many; its ids, nearest first."""
    ids: list[LayerId] = []
    with running.client() as client:
        for depth in range(length):
            id = name(f"{length}/{depth}")
            client.create(id, parent=ids[0] if ids else "")
            ids.insert(0, id)
        for top in tops:
            client.create(top, parent=ids[0])
    return ids


def asking(line: Line, id: str) -> Callable[[], None]:
    """A `get` that mounts and a `put` that unmounts, as one call without arguments."""
    get, put = request("get", id=id), request("put", id=id)
    found = require_result(line.ask(get))
    gone = require_result(line.ask(put))
    assert (found["mounted"], found["references"]) == (True, 1)
    assert gone["mounted"] is False

    def pair() -> None:
        line.ask(get)
        line.ask(put)

    return pair


@contextmanager
def bare(running: Daemon, top: LayerId, lowers: list[LayerId]) -> Iterator[Callable[[], None]]:
    """The very calls that aufsd makes for this layer, with all that they need made before."""
    layout = Layout(str(running.root))
    backend = choose("overlay", "", layout).backend
    union = Union(
        id=top,
        top=layout.content(top),
        lowers=tuple(map(layout.content, lowers)),
        target=layout.mount_point(top),
        work=layout.work(top),
    )
    os.makedirs(union.work, exist_ok=True)
    calls = [(call, *_opened(call)) for call in backend.plan(union)]

    def pair() -> None:
        for call, _, data in calls:
            syscalls.mount("none", call.target, call.fstype, call.flags, data)
        syscalls.umount2(union.target, syscalls.UMOUNT_NOFOLLOW)

    before = os.getcwd()
    # branches by number are names in here
    os.chdir("/proc/self/fd")
    try:
        yield pair
    finally:
        os.chdir(before)
        for _, opened, _ in calls:
            for fd in opened:
                os.close(fd)


def _opened(call: MountCall) -> tuple[list[int], str]:
    if not call.by_number:
        return [], call.render(call.dirs)
    opened = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in call.dirs]
    return opened, call.render(opened)


def chains(bench: Bench) -> Iterator[Outcome]:
    """Chains of several lengths; each round takes the median of some pairs."""
    goals = {1: 1.5, 20: 1.5, 120: 1.5}
    lengths = (1, 20, 120) if bench.quick else (1, 5, 20, 50, 120, 250, 490)
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    with daemon(bench.work / "aufsd") as running, closing(Line(running.socket)) as line:
        for length in lengths:
            lowers = make_chain(running, length, f"ours{length}", f"bare{length}")
            with bare(running, LayerId(f"bare{length}"), lowers) as pair:
                measured = {
                    "aufsd": partial(typical, asking(line, f"ours{length}"), 30),
                    "mount(2)": partial(typical, pair, 30),
                }
                found = interleaved(measured, bench.rounds(21), warm=2)
            ours.append((length, median(found["aufsd"])))
            theirs.append((length, median(found["mount(2)"])))
            if length in goals:
                text = f"get + put with a real mount, chain of {length}, p50"
                yield compare(f"mounts-{length}", text, found, "mount(2)", goal=goals[length])
    panel = "layers in a chain"
    yield Curve(panel=panel, name="get + put", points=tuple(ours))
    yield Curve(panel=panel, name="mount(2) + umount2(2)", points=tuple(theirs))


CASES = (Case("mounts", chains),)
