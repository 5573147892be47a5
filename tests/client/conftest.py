"""A server: beside the test, and in a thread of its own for clients that block."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd.service import log
from tests.client.threaded import Daemon, running
from tests.rpc.conftest import served as served


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """The server logs in this process too, where the command's output is looked at."""
    with open(os.devnull, "wb") as null:
        log.configure(fd=null.fileno())
        yield
        log.configure()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running(tmp_path) as found:
        yield found
