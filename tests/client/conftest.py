"""A server: beside the test, and in a thread of its own for clients that block."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.client.threaded import Daemon, running
from tests.rpc.serving import Served, start


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running(tmp_path) as found:
        yield found


@pytest.fixture
async def served(nursery: trio.Nursery, tmp_path: Path) -> Served:
    return await start(nursery, tmp_path)
