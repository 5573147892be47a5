"""Starts the server under test."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import trio

from aufsd.driver import Driver
from aufsd.rpc.listeners import bind
from aufsd.rpc.runner import Observe
from aufsd.rpc.server import Server, ServerSettings, serve
from tests.rpc.fake_driver import FakeDriver
from tests.rpc.raw_peer import RawPeer

Connect = Callable[[Path | str], RawPeer]


@dataclass
class Served:
    """A server that runs: its sockets, what is behind it, and what it observed."""

    control: Path
    monitor: Path
    driver: FakeDriver
    shutdown: trio.Event
    done: trio.Event
    observed: list[tuple[str, str]] = field(default_factory=list)
    server: Server = field(init=False)

    def observe(self, method: str, outcome: str, seconds: float) -> None:
        """Note how a call ended."""
        self.observed.append((method, outcome))


async def start(
    nursery: trio.Nursery,
    directory: Path,
    settings: ServerSettings | None = None,
    *,
    observe: Observe | None = None,
) -> Served:
    """Have a server run in `nursery`, until that is cancelled or `shutdown` is set.

    What it observes is noted in `observed`, unless there is an `observe`.
    """
    made = Served(
        directory / "aufsd.sock",
        directory / "monitor.sock",
        FakeDriver(),
        trio.Event(),
        trio.Event(),
    )
    made.server = await nursery.start(
        partial(_run, made, settings or ServerSettings(), observe or made.observe)
    )
    return made


async def _run(
    made: Served, settings: ServerSettings, observe: Observe, task_status: trio.TaskStatus[Server]
) -> None:
    try:
        await serve(
            [bind(str(made.control), monitor=False), bind(str(made.monitor), monitor=True)],
            cast(Driver, made.driver),
            settings,
            shutdown=made.shutdown,
            observe=observe,
            task_status=task_status,
        )
    finally:
        made.done.set()
