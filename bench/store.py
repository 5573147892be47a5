"""What a large store costs: calls, start, and memory with 10,000 layers and 1,000 mounts."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from aufsd.store import creation, dialect
from aufsd.store.ids import LayerId
from aufsd.store.opening import open_store
from bench.daemon import Daemon, Line, daemon, namespace, request, require_result
from bench.figures import Curve, Figure, Goal, Outcome, alone, compare
from bench.harness import Bench, Case, interleaved, typical
from bench.mounts import asking, name

DEPTH = 10  # layers in a chain
# an idle Trio process that has imported what the daemon has
_IDLE = "import aufsd.daemon, trio; print(flush=True); trio.run(trio.sleep_forever)"


def fill(root: Path, layers: int) -> list[LayerId]:
    """Make a store of so many layers in chains of ten; the ids that nothing stands on."""
    root.mkdir(parents=True)
    tops: list[LayerId] = []
    marks = dialect.xattrs(dialect.Dialect.OVERLAY, "trusted")
    store = open_store(str(root), adopt=False, sync="none")
    try:
        for number in range(0, layers, DEPTH):
            chain: tuple[LayerId, ...] = ()
            for depth in range(DEPTH):
                id = name(f"{number}/{depth}")
                creation.create_on_disk(store, id, chain, marks)
                chain = (id, *chain)
            tops.append(chain[0])
    finally:
        store.close()
    return tops


@contextmanager
def stocked(directory: Path, layers: int, mounts: int) -> Iterator[tuple[Daemon, list[LayerId]]]:
    """A daemon with so many layers, the first tops of which are mounted; in its own namespace."""
    directory.mkdir()
    tops = fill(directory / "store", layers)
    with namespace() as prefix, daemon(directory, "--sync", "none", prefix=prefix) as running:
        mount(running, tops[:mounts])
        yield running, tops


def mount(running: Daemon, ids: list[LayerId]) -> None:
    """Have these mounted for good."""
    with closing(Line(running.socket)) as line:
        for id in ids:
            require_result(line.ask(request("get", id=id)))


def sizes(bench: Bench) -> tuple[int, int]:
    """Layers and mounts of the large store; a quick run says by its text that it is smaller."""
    return (1000, 100) if bench.quick else (10_000, 1000)


def calls(bench: Bench) -> Iterator[Outcome]:
    """The same calls on a large store and on a small one."""
    layers, mounts = sizes(bench)
    with (
        stocked(bench.work / "large", layers + DEPTH, mounts) as (large, tops),
        stocked(bench.work / "small", 2 * DEPTH, 1) as (small, few),
        closing(Line(large.socket)) as there,
        closing(Line(small.socket)) as here,
    ):
        big, little = f"{layers:,} layers", f"{DEPTH} layers"
        for case, what, make, which, number in (
            ("store-count", "of a mounted layer", counting, 0, 300),
            ("store-mount", "with a real mount", asking, -1, 30),
        ):
            measured = {
                big: partial(typical, make(there, tops[which]), number),
                little: partial(typical, make(here, few[which]), number),
            }
            found = interleaved(measured, bench.rounds(31), warm=2)
            yield compare(
                case,
                f"get + put {what}, {layers:,} layers, {mounts:,} mounts",
                found,
                little,
                ours=big,
                goal=1.2,
            )


def counting(line: Line, id: LayerId) -> Callable[[], None]:
    """A `get` and a `put` of a layer that stays mounted."""
    get, put = request("get", id=id), request("put", id=id)
    require_result(line.ask(get))
    assert require_result(line.ask(put))["mounted"], "what is measured is not what is meant"

    def pair() -> None:
        line.ask(get)
        line.ask(put)

    return pair


def start_and_memory(bench: Bench) -> Iterator[Outcome]:
    """The daemon is killed and started again over its store and its live mounts."""
    layers, mounts = sizes(bench)
    with stocked(bench.work / "large", layers, mounts) as (running, _), idle() as process:

        def again() -> float:
            running.stop(signal.SIGKILL)
            return running.start()

        found = interleaved({"aufsd": again}, bench.rounds(9))["aufsd"]
        text = f"start to READY, {layers:,} layers, {mounts:,} live mounts"
        yield alone("store-start", text, found, goal=1.0)
        with running.client() as client:
            assert client.call("status", {})["mounts"] == mounts, "mounts were lost at the start"
        own, other = resident(running.pid), resident(process.pid)
        yield Figure(
            case="store-memory",
            text=f"memory at {layers:,} layers, beyond an idle process with the same imports",
            unit="bytes",
            ours=own - other,
            goal=Goal(20 << 20, of="figure"),
            note=f"{own >> 20} MB and {other >> 20} MB",
        )


@contextmanager
def idle() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that does nothing, with all that the daemon imports."""
    process = subprocess.Popen([sys.executable, "-c", _IDLE], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)  # for Trio's own start
        yield process
    finally:
        process.kill()
        process.communicate()


def resident(pid: int) -> int:
    """Bytes of memory that a process has (proc(5), VmRSS)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise ProcessLookupError(pid)


def growth(bench: Bench) -> Iterator[Outcome]:
    """How calls grow with layers in the store, and with live mounts, for the chart."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def measure(panel: str, amount: int, running: Daemon, tops: list[LayerId]) -> None:
        with closing(Line(running.socket)) as line:
            for what, ask in (
                ("get + put, counted", counting(line, tops[0])),
                ("get + put, mounted", asking(line, tops[-1])),
            ):
                found = median(typical(ask, 30) for _ in range(bench.rounds(9)))
                points.setdefault((panel, what), []).append((amount, found))

    layers, mounts = sizes(bench)
    steps = (10, 100, 1000, 10_000)
    for number in (step for step in steps if step <= layers):
        with stocked(bench.work / f"layers{number}", number + DEPTH, 1) as (running, tops):
            measure("layers in the store", number, running, tops)
    with stocked(bench.work / "mounts", layers + DEPTH, 1) as (running, tops):
        done = 1
        for number in (step for step in (1, 10, 100, 1000) if step <= mounts):
            mount(running, tops[done:number])
            done = number
            measure("live mounts", number, running, tops)
    for (panel, what), line_points in points.items():
        yield Curve(panel=panel, name=what, points=tuple(line_points))


CASES = (
    Case("store-calls", calls),
    Case("store-start", start_and_memory),
    Case("growth-store", growth),
)
