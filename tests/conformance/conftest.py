"""One suite over every backend that this host has."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.layers import Layers, open_layers


@pytest.fixture(
    params=[
        pytest.param("aufs", marks=pytest.mark.aufs),
        "overlay",
        pytest.param("fuse-overlayfs", marks=pytest.mark.fuse),
    ]
)
def backend_name(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return str(request.param)


@pytest.fixture
def layers(backend_name: str, tmp_path: Path) -> Iterator[Layers]:
    """An empty store of that backend."""
    with open_layers(backend_name, f"{tmp_path}/store") as opened:
        yield opened
