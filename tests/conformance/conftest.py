"""One suite over every backend that this host has."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends import BACKENDS, UNIONS
from tests.conformance.layers import Layers, open_layers


@pytest.fixture(params=UNIONS)
def backend_name(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return str(request.param)


@pytest.fixture
def layers(backend_name: str, tmp_path: Path) -> Iterator[Layers]:
    """An empty store of that backend."""
    with open_layers(backend_name, f"{tmp_path}/store") as opened:
        yield opened


@pytest.fixture(params=BACKENDS)
def shown(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Layers]:
    """An empty store of each backend, those that make no unions too: for what a chain shows."""
    name = str(request.param)
    root = request.getfixturevalue("on_btrfs") if name == "btrfs" else tmp_path
    with open_layers(name, f"{root}/store") as opened:
        yield opened
