"""The driver as the daemon opens it, called as an rpc method calls it; no sockets."""

import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

from aufsd import results
from aufsd.config import Config
from aufsd.daemon import open_driver
from aufsd.driver import Driver
from aufsd.kernel.peer import Peer
from aufsd.root import open_root
from aufsd.service.metrics import Metrics
from aufsd.store.ids import LayerId
from aufsd.tasks import Tasks
from tests.archives import tar

BASE, TOP, NEW = LayerId("base"), LayerId("top"), LayerId("new")
ME = Peer(os.getpid(), 0, 0, "test", 1)


@asynccontextmanager
async def opened(tmp_path: Path, *, made: bool = False) -> AsyncIterator[Driver]:
    """The driver as the daemon has it, with `base` and `top` on it; nothing stays mounted.

    `made`: the layers are there from the last time.
    """
    root, state = tmp_path / "store", tmp_path / "run"
    config = Config(root=str(root), state_dir=str(state), backend="overlay")
    store = open_root(config)
    try:
        async with open_driver(store, config, Metrics(), Tasks()) as driver:
            if not made:
                await create(driver, BASE, None)
                await create(driver, TOP, BASE)
                await apply(driver, tmp_path, b"old")
            try:
                yield driver
            finally:
                await driver.cleanup()
    finally:
        store.close()


async def create(driver: Driver, id: LayerId, parent: LayerId | None) -> None:
    await driver.create(id, parent=parent, mount_label="", storage_opt={})


async def apply(driver: Driver, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tar").write_bytes(tar({"file": content}))
    with (tmp_path / "tar").open("rb") as source:
        await driver.apply_diff(TOP, parent=None, source=source.fileno(), digest=False)


async def get(driver: Driver, id: LayerId) -> results.Got:
    """One reference of this process, waited for if there is more to do than to count."""
    answer = driver.get(id, peer=ME, mount_label="", hold="manual")
    return await answer if isinstance(answer, Coroutine) else answer


async def put(driver: Driver, id: LayerId) -> results.Put:
    """The same the other way."""
    answer = driver.put(id, peer=ME)
    return await answer if isinstance(answer, Coroutine) else answer
