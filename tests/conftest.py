"""Tiers: what this machine can run is found out, said in the report header, and held to.

`AUFSD_REQUIRE="mounts service"` turns a tier that is off into an error; `.ci/run` sets it.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd_client import Client
from tests import packages
from tests.backends import BACKENDS
from tests.btrfs import btrfs_at
from tests.daemon import Daemon, daemon
from tests.tiers import OFF


def pytest_report_header() -> list[str]:
    return [
        "tier pure: on",
        *(f"tier {tier}: {'off, ' + why if why else 'on'}" for tier, why in OFF.items()),
    ]


def pytest_configure() -> None:
    os.environ["PATH"] = packages.PATH
    # a shell's background jobs ignore it, and so would all that is started from here
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    required = os.environ.get("AUFSD_REQUIRE", "").split()
    missing = [f"{tier} ({OFF[tier]})" for tier in required if OFF[tier]]
    if missing:
        raise pytest.UsageError(f"AUFSD_REQUIRE asks for tiers that are off: {', '.join(missing)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for tier, why in OFF.items():
        if why and item.get_closest_marker(tier):
            pytest.skip(why)


@pytest.fixture(scope="session")
def btrfs_ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A btrfs for the whole run; make a directory of your own in it."""
    with btrfs_at(tmp_path_factory.mktemp("ground")) as ground:
        yield ground


@pytest.fixture
def on_btrfs(btrfs_ground: Path) -> Path:
    """A directory on btrfs, for one test."""
    made = btrfs_ground / f"{len(list(btrfs_ground.iterdir()))}"
    made.mkdir()
    return made


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon over a new store; a module that wants another has a fixture of this name."""
    with daemon(tmp_path) as made:
        yield made


@pytest.fixture(params=BACKENDS)
def each_backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon over a new store, of each backend in turn."""
    name = str(request.param)
    root = request.getfixturevalue("on_btrfs") if name == "btrfs" else tmp_path
    with daemon(tmp_path, "--backend", name, root=root / "store") as made:
        yield made


@pytest.fixture
def client(served: Daemon) -> Iterator[Client]:
    """A client of it."""
    with served.client() as made:
        yield made
