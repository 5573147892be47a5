"""Runs the server over the fake driver in a thread, and lets others reach into it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import trio
import trio.testing

from aufsd.rpc.server import ServerSettings
from tests.rpc.fake_driver import FakeDriver
from tests.rpc.raw_peer import PATIENCE
from tests.rpc.serving import Served, start

T = TypeVar("T")


@dataclass
class Daemon:
    """What a test needs of the server: its sockets, its driver, and a way into its thread."""

    served: Served
    token: trio.lowlevel.TrioToken

    @property
    def path(self) -> str:
        return str(self.served.control)

    @property
    def driver(self) -> FakeDriver:
        return self.served.driver

    def do(self, function: Callable[[], T]) -> T:
        """Call a function in the server's thread."""
        return trio.from_thread.run_sync(function, trio_token=self.token)

    def until_running(self, count: int) -> None:
        """Wait until so many calls are inside the driver."""

        async def wait() -> None:
            with trio.fail_after(PATIENCE):
                await self.driver.until_running(count)

        trio.from_thread.run(wait, trio_token=self.token)

    def settle(self) -> None:
        """Wait until the server has nothing to do but wait."""
        trio.from_thread.run(trio.testing.wait_all_tasks_blocked, trio_token=self.token)

    def until_done(self) -> None:
        """Wait until the server has stopped."""

        async def wait() -> None:
            with trio.fail_after(PATIENCE):
                await self.served.done.wait()

        trio.from_thread.run(wait, trio_token=self.token)


@contextmanager
def running(directory: Path, settings: ServerSettings | None = None) -> Iterator[Daemon]:
    """A server that runs inside the block."""
    started: SimpleQueue[Daemon | BaseException] = SimpleQueue()
    stop = trio.Event()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            served = await start(nursery, directory, settings)
            started.put(Daemon(served, trio.lowlevel.current_trio_token()))
            await stop.wait()
            nursery.cancel_scope.cancel()

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as error:
            started.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    daemon = started.get()
    if isinstance(daemon, BaseException):
        raise daemon
    try:
        yield daemon
    finally:
        daemon.do(stop.set)
        thread.join()
