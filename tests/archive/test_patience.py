"""A peer that keeps its descriptor open and moves nothing does not hold a job's place for ever."""

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from aufsd.archive import patience
from aufsd.archive.meter import Meter
from aufsd.results import Streamed
from aufsd_client.errors import StreamBroken
from tests.archive.shelf import Shelf, open_shelf
from tests.archive.tars import entry, tar

pytestmark = pytest.mark.mounts

BODY = b"y" * 2_000_000


@pytest.fixture
async def impatient(tmp_path: Path) -> AsyncIterator[Shelf]:
    """A shelf with room for one job, a layer `full` and one that is `empty`."""
    async with open_shelf(tmp_path, max_jobs=1, stream_timeout=0.2) as shelf:
        (shelf.add("full") / "file").write_bytes(BODY)
        shelf.add("empty")
        yield shelf


@pytest.fixture(params=[True, False], ids=["blocking", "non-blocking"])
def pipe(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    r, w = os.pipe()
    for fd in (r, w):
        os.set_blocking(fd, request.param)
    yield r, w
    os.close(r)
    os.close(w)


def diff(shelf: Shelf, pipe: tuple[int, int]) -> Awaitable[Streamed]:
    return shelf.jobs.diff(shelf.chain("full"), pipe[1])


def diff_with_digest(shelf: Shelf, pipe: tuple[int, int]) -> Awaitable[Streamed]:
    return shelf.jobs.diff(shelf.chain("full"), pipe[1], digest=True)


def apply_of_nothing(shelf: Shelf, pipe: tuple[int, int]) -> Awaitable[Streamed]:
    return shelf.jobs.apply(shelf.chain("empty"), str(shelf.path("empty")), pipe[0])


def apply_of_a_part(shelf: Shelf, pipe: tuple[int, int]) -> Awaitable[Streamed]:
    os.write(pipe[1], tar(entry("file", BODY))[:2000])
    return apply_of_nothing(shelf, pipe)


@pytest.mark.parametrize("work", [diff, diff_with_digest, apply_of_nothing, apply_of_a_part])
async def test_a_peer_that_moves_nothing_ends_the_job_and_another_has_its_place(
    impatient: Shelf,
    pipe: tuple[int, int],
    work: Callable[[Shelf, tuple[int, int]], Awaitable[Streamed]],
) -> None:
    with pytest.raises(StreamBroken) as caught:
        await work(impatient, pipe)
    assert caught.value.data["errno"] == "ETIMEDOUT"
    assert impatient.jobs.running() == []
    assert len(await impatient.diff("full")) > len(BODY)


class Clock:
    """Goes on when told to. The looks are raised by hand: the timer would come after a day."""

    def __init__(self) -> None:
        self.meter = Meter(lambda size, entries: None)
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def look(self, after: float) -> float:
        """Look after so many seconds; how long it is to the next look."""
        self.now += after
        signal.raise_signal(signal.SIGALRM)
        return signal.getitimer(signal.ITIMER_REAL)[0]


DAY = 86_400.0


def test_one_that_moves_a_little_now_and_then_is_served() -> None:
    clock = Clock()
    with patience.limited(clock.meter, DAY, clock):
        for _ in range(10):
            clock.meter.waiting_since = clock.now
            clock.look(DAY - 1)


def test_time_that_passes_without_waiting_for_the_peer_counts_nothing() -> None:
    clock = Clock()
    with patience.limited(clock.meter, DAY, clock):
        for _ in range(3):
            clock.meter.waiting_since = None
            clock.look(2 * DAY)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_time_is_over_when_it_is_over_and_not_later() -> None:
    clock = Clock()
    with patience.limited(clock.meter, DAY, clock):
        clock.look(1)
        clock.meter.waiting_since = clock.now
        next_look = clock.look(DAY - 10)
        assert 9 < next_look <= 10
        # a write that this look interrupts may have moved something, and would say so now
        assert clock.look(10) < 0.1
        with pytest.raises(StreamBroken, match="86400 s"):
            clock.look(0.001)


def test_what_the_last_look_cut_short_has_moved() -> None:
    clock = Clock()
    with patience.limited(clock.meter, DAY, clock):
        clock.meter.waiting_since = clock.now
        clock.look(DAY)
        clock.meter.waiting_since = clock.now
        clock.look(0.001)
