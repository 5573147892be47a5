"""How is measured: sides in turn, A B A B, so that what else the machine does falls on all."""

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.figures import Outcome
from bench.peers import Peers


@dataclass(frozen=True, slots=True)
class Bench:
    """What a case needs. `work` is a directory on a real file system, the case's own."""

    work: Path
    peers: Peers
    quick: bool = False

    def rounds(self, wanted: int) -> int:
        """How many rounds to make; fewer in a quick run."""
        return max(3, wanted // 5) if self.quick else wanted


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is measured; it may give several figures."""

    name: str
    run: Callable[[Bench], Iterable[Outcome]]


def interleaved(
    sides: Mapping[str, Callable[[], float]], rounds: int, *, warm: int = 1
) -> dict[str, list[float]]:
    """Call every side in turn, `rounds` times; what each gave. `warm` rounds before do not count.

    Every other round goes backwards: a side that leaves the caches, or the disk, worse than it
    found them does not always do so to the same one.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    try:
        for number in range(-warm, rounds):
            order = list(sides.items())
            for name, measure in order if number % 2 else reversed(order):
                value = measure()
                if number >= 0:
                    found[name].append(value)
    finally:
        gc.enable()
    return found


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def typical(work: Callable[[], object], count: int) -> float:
    """The median of so many calls, each in seconds."""
    return median(seconds(work) for _ in range(count))
