"""Eight clients at once, and what they are told has to be what some order of their calls explains.

AUFSD_MODEL=N makes N bursts in each test, AUFSD_SEED=N takes other ones: see CONTRIBUTING.md.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon import daemon
from tests.model.bursts import Run
from tests.model.world import State
from tests.small import ext4_at

# by hand alone while histories are found that nobody has explained yet
pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif("AUFSD_MODEL" not in os.environ, reason="AUFSD_MODEL=N is not set"),
]

MORE = bool(os.environ.get("AUFSD_CRASH"))
BURSTS = int(os.environ.get("AUFSD_MODEL") or (150 if MORE else 8))
SEED = int(os.environ.get("AUFSD_SEED") or 1)
BACKENDS = (
    pytest.param("aufs", marks=pytest.mark.aufs),
    "overlay",
    pytest.param("fuse-overlayfs", marks=pytest.mark.fuse),
    pytest.param("btrfs", marks=pytest.mark.btrfs),
)


@contextmanager
def running(tmp_path: Path, root: Path, backend: str) -> Iterator[Run]:
    with daemon(tmp_path, "--backend", backend, "--sync", "none", root=root) as served:
        yield Run(served, SEED, State(snapshots=backend == "btrfs"))


@pytest.fixture(params=BACKENDS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    name = str(request.param)
    ground = request.getfixturevalue("on_btrfs") if name == "btrfs" else tmp_path
    with running(tmp_path, ground / "store", name) as made:
        yield made


def test_some_order_of_the_calls_explains_what_each_was_told(run: Run) -> None:
    for _ in range(BURSTS):
        run.burst()


@pytest.mark.ext4
@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_so_it_does_while_the_disk_is_full_at_times(backend: str, tmp_path: Path) -> None:
    with ext4_at(tmp_path) as disk, running(tmp_path, disk / "store", backend) as run:
        for _ in range(BURSTS):
            run.burst(disk=disk)
            with run.daemon.client() as client:
                assert client.health().status == "ok"


def test_so_it_does_when_the_daemon_is_killed_meanwhile(run: Run) -> None:
    for _ in range(max(2, BURSTS // 8)):
        run.burst()
        run.burst(kill=True)
