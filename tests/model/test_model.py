"""Eight clients at once, and what they are told has to be what some order of their calls explains.

A plain test run has a few bursts of one seed; `make test-all` more, of three seeds. AUFSD_MODEL=N,
by hand, makes N bursts in each test, also of a seed that is another each time, on fuse-overlayfs,
and on a disk that is full at times: the model does not explain yet all that those answer.
AUFSD_SEED=N takes those of that seed alone. See CONTRIBUTING.md.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.backends import BACKENDS, UNIONS
from tests.daemon import daemon
from tests.model.bursts import Run
from tests.model.world import State
from tests.small import ext4_at

pytestmark = pytest.mark.service

MORE = bool(os.environ.get("AUFSD_CRASH"))
BY_HAND = "AUFSD_MODEL" in os.environ
BURSTS = int(os.environ.get("AUFSD_MODEL") or (12 if MORE else 4))
# "another": the name of a test is the same in every process
SEEDS = ["1"]
if "AUFSD_SEED" in os.environ:
    SEEDS = [os.environ["AUFSD_SEED"]]
elif BY_HAND:
    SEEDS += ["2", "3", "another"]
elif MORE:
    SEEDS += ["2", "3"]


@pytest.fixture(params=SEEDS)
def seed(request: pytest.FixtureRequest) -> int:
    chosen = random.randrange(10**6) if request.param == "another" else int(request.param)
    # shown if the test fails
    print(f"AUFSD_SEED={chosen}")
    return chosen


@contextmanager
def running(tmp_path: Path, root: Path, backend: str, seed: int) -> Iterator[Run]:
    with daemon(tmp_path, "--backend", backend, "--sync", "none", root=root) as served:
        yield Run(served, seed, State(snapshots=backend == "btrfs"))


@pytest.fixture(params=BACKENDS)
def run(request: pytest.FixtureRequest, tmp_path: Path, seed: int) -> Iterator[Run]:
    name = str(request.param)
    if name == "fuse-overlayfs" and not BY_HAND:
        pytest.skip("by hand: AUFSD_MODEL=N")
    ground = request.getfixturevalue("on_btrfs") if name == "btrfs" else tmp_path
    with running(tmp_path, ground / "store", name, seed) as made:
        yield made


def test_some_order_of_the_calls_explains_what_each_was_told(run: Run) -> None:
    for _ in range(BURSTS):
        run.burst()


@pytest.mark.ext4
@pytest.mark.skipif(not BY_HAND, reason="by hand: AUFSD_MODEL=N")
@pytest.mark.parametrize("backend", UNIONS)
def test_so_it_does_while_the_disk_is_full_at_times(
    backend: str, tmp_path: Path, seed: int
) -> None:
    with ext4_at(tmp_path) as disk, running(tmp_path, disk / "store", backend, seed) as run:
        for _ in range(BURSTS):
            run.burst(disk=disk)
            with run.daemon.client() as client:
                assert client.health().status == "ok"


def test_so_it_does_when_the_daemon_is_killed_meanwhile(run: Run) -> None:
    for _ in range(max(1, BURSTS // 4)):
        run.burst()
        run.burst(kill=True)
