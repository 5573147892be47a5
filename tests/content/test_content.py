"""What layers hold, held against a model in plain Python through checkpoints, forks and crashes.

A plain test run takes one walk for each backend, `make test-all` more and longer ones, and a
thousand checkpoints in a row.
"""

import os
import random
from pathlib import Path

import pytest

from tests.content.world import World
from tests.daemon import Daemon

pytestmark = pytest.mark.service

MORE = bool(os.environ.get("AUFSD_CRASH"))
SEEDS, STEPS = (8, 150) if MORE else (1, 60)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_layers_hold_what_the_model_says(seed: int, each_backend: Daemon) -> None:
    with each_backend.client() as client:
        backend = client.version().backend
    chosen = random.Random(f"{backend} {seed}")
    # fuse-overlayfs cannot link or set the times of some files; aufs keeps links by other rules
    links = backend in ("overlay", "btrfs")
    world = World(each_backend, chosen, whole=backend == "btrfs", links=links)
    world.begin()
    try:
        for number in range(STEPS):
            world.step()
            if number % 20 == 19:
                world.compare()
        world.compare()
        assert world.client.check(deep=True).problems == []
    except BaseException:
        print("\n".join(world.done))
        raise
    finally:
        for client in world.clients:
            client.close()


@pytest.mark.skipif(not MORE, reason="make test-all runs this")
def test_a_thousand_checkpoints_with_squashes_between(served: Daemon) -> None:
    with served.client() as client:
        client.create("base")
        client.create("top", parent="base")
        path = Path(client.get("top").path)
        for number in range(1, 1001):
            (path / f"f{number % 37}").write_text(str(number))
            (path / f"d{number % 7}").mkdir(exist_ok=True)
            if number % 5 == 0:
                (path / f"f{number % 11}").unlink(missing_ok=True)
            shows = {each.name: each.is_dir() or each.read_text() for each in path.iterdir()}
            client.checkpoint_next("top")
            if number % 50 == 0:
                client.put("top")
                assert len(client.squash("top", "base").removed) == 50
                assert Path(client.get("top").path) == path
            found = {each.name: each.is_dir() or each.read_text() for each in path.iterdir()}
            assert found == shows
        assert client.check(deep=True).problems == []
