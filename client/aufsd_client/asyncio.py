"""The client for asyncio. Standard library only."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from aufsd_client import awaited
from aufsd_client.wire import DEFAULT_SOCKET


class _Asyncio:
    async def readable(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_reader(sock, _set, ready)
        try:
            await ready
        finally:
            loop.remove_reader(sock)

    async def writable(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_writer(sock, _set, ready)
        try:
            await ready
        finally:
            loop.remove_writer(sock)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def finish(self, act: Callable[[], Awaitable[Any]]) -> None:
        running = asyncio.ensure_future(act())
        cancelled = None
        while not running.done():
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError as error:
                if running.cancelled():
                    raise
                cancelled = error
        if cancelled is not None:
            raise cancelled
        running.result()

    def closed(self) -> Exception:
        return RuntimeError("the client is closed")


def _set(ready: "asyncio.Future[None]") -> None:
    # called again before the waiting task has run
    if not ready.done():
        ready.set_result(None)


class Client(awaited.Client):
    """See awaited.Client, whose methods these are. For the tasks of one event loop."""

    def __init__(self, path: str | os.PathLike[str] = DEFAULT_SOCKET) -> None:
        super().__init__(path, _Asyncio())
