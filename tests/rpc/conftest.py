"""A server over the fake driver, on real sockets."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from aufsd.service import log
from tests.rpc.raw_peer import RawPeer
from tests.rpc.serving import Connect, Served, start


@pytest.fixture(autouse=True)
def _log() -> None:
    log.configure("debug", json=True)


@pytest.fixture
async def served(nursery: trio.Nursery, tmp_path: Path) -> Served:
    return await start(nursery, tmp_path)


@pytest.fixture
def connect() -> Iterator[Connect]:
    peers: list[RawPeer] = []

    def make(path: Path | str) -> RawPeer:
        peers.append(RawPeer(path))
        return peers[-1]

    yield make
    for peer in peers:
        peer.sock.close()
