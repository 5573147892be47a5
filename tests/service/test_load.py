"""Many clients at once: every count right at the end, and no mount left."""

import os
import random

import pytest
import trio

from aufsd_client import Client
from aufsd_client.trio import Client as TrioClient
from tests.daemon import Daemon, eventually

pytestmark = pytest.mark.service

LAYERS, CLIENTS, CALLS = 20, 200, 10_000


async def test_200_clients_get_and_put_on_20_layers(served: Daemon, client: Client) -> None:
    client.create("base")
    ids = [f"layer{number}" for number in range(LAYERS)]
    for id in ids:
        client.create(id, parent="base")
    calls = 0
    before = served.descriptors()

    async def work(seed: int) -> None:
        nonlocal calls
        rng = random.Random(seed)
        held: list[str] = []
        async with TrioClient(served.socket) as own:
            for _ in range(CALLS // CLIENTS // 2):
                id = rng.choice(ids)
                got = await own.get(id)
                held.append(id)
                assert got.mounted
                assert got.references >= 1
                # a counted layer is a mount point, whatever the others do
                assert os.path.ismount(got.path)
                calls += 1
                if rng.random() < 0.7:
                    await own.put(held.pop(rng.randrange(len(held))))
                    calls += 1
            for id in held:
                await own.put(id)
                calls += 1

    async with trio.open_nursery() as nursery:
        for seed in range(CLIENTS):
            nursery.start_soon(work, seed)
    assert calls == CALLS
    assert client.mounts().mounts == []
    assert served.mounts() == []
    # the daemon closes a connection a moment after its peer has
    eventually(lambda: served.descriptors() <= before)
    assert client.check().problems == []
