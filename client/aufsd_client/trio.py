"""The client for Trio. Needs trio (extra `trio`); nothing else of the package does."""

import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from aufsd_client import awaited
from aufsd_client.wire import DEFAULT_SOCKET


class _Trio:
    async def readable(self, sock: socket.socket) -> None:
        await trio.lowlevel.wait_readable(sock)

    async def writable(self, sock: socket.socket) -> None:
        await trio.lowlevel.wait_writable(sock)

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    async def finish(self, act: Callable[[], Awaitable[Any]]) -> None:
        with trio.CancelScope(shield=True):
            await act()

    def closed(self) -> Exception:
        return trio.ClosedResourceError("the client is closed")


class Client(awaited.Client):
    """See awaited.Client, whose methods these are."""

    def __init__(self, path: str | os.PathLike[str] = DEFAULT_SOCKET) -> None:
        super().__init__(path, _Trio())
