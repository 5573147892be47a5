"""A shelf of layers for a test."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from aufsd.archive.fork import ForkServer
from tests.archive.shelf import Shelf, open_shelf


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """One fork server for the whole run; it knows nothing of stores."""
    found = ForkServer(str(tmp_path_factory.mktemp("fork-server")))
    yield found
    found.stop()


@pytest.fixture
async def shelf(tmp_path: Path, server: ForkServer) -> AsyncIterator[Shelf]:
    async with open_shelf(tmp_path, server) as found:
        yield found
