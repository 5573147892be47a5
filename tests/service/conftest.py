"""A daemon and a client, for every test here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd_client import Client
from tests.daemon import Daemon, daemon


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon over a new store."""
    with daemon(tmp_path) as made:
        yield made


@pytest.fixture
def client(served: Daemon) -> Iterator[Client]:
    """A client of it."""
    with served.client() as made:
        yield made
