"""Layers made, mounted, written and put by many clients at once, all of them mounted together.

moby#21545: Docker's driver gave all its aufs mounts one translation file (xino), and concurrent
ones failed with EINVAL; a file shared unseen would give two files of a union one inode number.
"""

import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from aufsd_client import Client
from aufsd_client.trio import Client as TrioClient
from tests.daemon import Daemon

pytestmark = pytest.mark.service

LAYERS = 1_000
CLIENTS = 50


def contents(path: str) -> dict[str, str]:
    return {name: Path(path, name).read_text() for name in os.listdir(path)}


async def at_once(work: Callable[[Iterator[str]], Awaitable[None]], ids: list[str]) -> None:
    """Give the ids to as many clients, each taking the next one when it is done with one."""
    left = iter(ids)
    async with trio.open_nursery() as nursery:
        for _ in range(CLIENTS):
            nursery.start_soon(work, left)


async def test_1000_unions_made_at_once_are_each_their_own(served: Daemon, client: Client) -> None:
    client.create("base")
    with client.mounted("base") as path:
        for name in ("kept", "changed"):
            Path(path, name).write_text("base")
    ids = [f"layer{number:04}" for number in range(LAYERS)]
    paths: dict[str, str] = {}

    async def make(left: Iterator[str]) -> None:
        async with TrioClient(served.socket) as own:
            for id in left:
                await own.create(id, parent="base")
                paths[id] = (await own.get(id)).path
                Path(paths[id], "changed").write_text(id)
                Path(paths[id], "new").write_text(id)

    async def put(left: Iterator[str]) -> None:
        async with TrioClient(served.socket) as own:
            for id in left:
                assert not (await own.put(id)).mounted

    await at_once(make, ids)
    assert served.mounts() == ids
    for id in ids:
        assert contents(paths[id]) == {"kept": "base", "changed": id, "new": id}
        assert len({os.stat(f"{paths[id]}/{name}").st_ino for name in os.listdir(paths[id])}) == 3
    await at_once(put, ids)
    assert served.mounts() == []
    assert client.check().problems == []
    for id in ids[:: LAYERS // 10]:
        with client.mounted(id) as path:
            assert contents(path) == {"kept": "base", "changed": id, "new": id}
