"""The asynchronous client, for Trio (trio.py) and asyncio (asyncio.py). Standard library only."""

import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from aufsd_client import calls, checkpoints, parsing, results, streams
from aufsd_client.address import reachable
from aufsd_client.calls import Hold, Request
from aufsd_client.errors import LayerExists
from aufsd_client.methods import Methods
from aufsd_client.wire import (
    READ_SIZE,
    ConnectionLost,
    LineSplitter,
    Reply,
    decode_reply,
    descriptor,
    encode_request,
    match,
    unreachable,
)

T = TypeVar("T")

# idle connections that are kept for the next calls
_KEPT = 8
_CONNECT_PAUSE = 0.01  # seconds


class Waits(Protocol):
    """How to wait in an asynchronous framework."""

    async def readable(self, sock: socket.socket) -> None:
        """Wait until the socket can be read."""

    async def writable(self, sock: socket.socket) -> None:
        """Wait until the socket can be written."""

    async def sleep(self, seconds: float) -> None:
        """Wait for some seconds."""

    async def finish(self, act: Callable[[], Awaitable[Any]]) -> None:
        """Await `act` to its end, even if the caller is cancelled."""

    def closed(self) -> Exception:
        """The exception of a closed client."""


class Client(Methods):
    """A client of the daemon on the socket at `path`; for any number of tasks.

    A cancelled call closes its connection. Then the daemon cancels a running `diff` or
    `apply_diff`, and carries out any other call. The errors are those of the blocking client. No
    call is repeated. Use it in an `async with` block, or close it.
    """

    def __init__(self, path: str | os.PathLike[str], waits: Waits) -> None:
        self.path = os.fspath(path)
        self._waits = waits
        self._idle: list[_Link] = []
        self._numbers = count(1)
        self._closed = False

    def close(self) -> None:
        """Close the idle connections. A connection in use closes after its call."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- methods that the two kinds of client have each in its own way ------------------------

    async def diff(
        self,
        id: str,
        out: streams.HasFileno | streams.Path | bytearray,
        *,
        parent: str = "",
        digest: bool = False,
    ) -> results.Streamed:
        """Write the layer's changes as a tar to `out`: an open file, a path, or a bytearray."""
        with streams.sink(out) as fd:
            return await self._ask(calls.diff(id, parent=parent, digest=digest), fd)

    async def apply_diff(
        self,
        id: str,
        source: streams.HasFileno | streams.Path | bytes,
        *,
        parent: str = "",
        digest: bool = False,
    ) -> results.Streamed:
        """Unpack the tar that `source` is into the layer: an open file, a path, or bytes."""
        with streams.source(source) as fd:
            return await self._ask(calls.apply_diff(id, parent=parent, digest=digest), fd)

    async def discover(self) -> dict[str, object]:
        """The OpenRPC document."""
        return await self.call("rpc.discover", {})

    async def iter_changes(self, id: str, *, parent: str = "") -> AsyncIterator[results.Change]:
        """All changes of a layer, page after page."""
        after = ""
        while True:
            page = await self.changes(id, parent=parent, after=after)
            for change in page.changes:
                yield change
            if not (after := page.next):
                return

    async def iter_layers(self, *, prefix: str = "") -> AsyncIterator[results.LayerRow]:
        """All layers, page after page; with a `prefix`, those whose ids begin so."""
        after = ""
        while True:
            page = await self.list(after=after, prefix=prefix)
            for row in page.layers:
                yield row
            if not (after := page.next):
                return

    @asynccontextmanager
    async def mounted(
        self, id: str, mount_label: str = "", *, hold: Hold = "manual"
    ) -> AsyncIterator[str]:
        """`get` before the block, `put` after it, even if cancelled. Gives the layer's path."""
        path = (await self.get(id, mount_label=mount_label, hold=hold)).path
        try:
            yield path
        finally:
            await self._waits.finish(lambda: self.put(id))

    async def checkpoint_next(self, id: str, as_: str = "") -> results.Checkpointed:
        """Checkpoint a layer as `as_`, or as ID.1, ID.2, and so on. LayerExists, UnmountBusy."""
        if as_:
            return await self._ask(calls.checkpoint(id, as_))
        for _ in range(checkpoints.TRIES):
            taken = [row.id async for row in self.iter_layers(prefix=checkpoints.stem(id))]
            with suppress(LayerExists):
                return await self._ask(calls.checkpoint(id, checkpoints.next_name(id, taken)))
        return await self._ask(calls.checkpoint(id, checkpoints.next_name(id, taken)))

    async def fork(self, id: str, new: str, as_: str = "") -> results.Checkpointed:
        """Checkpoint a layer, and create the layer `new` on the checkpoint, which is the result.

        If `new` cannot be created the checkpoint stays. Raises LayerExists, UnmountBusy.
        """
        if (await self.exists(new)).exists:
            raise LayerExists(f"layer {new} exists already", id=new)
        made = await self.checkpoint_next(id, as_)
        await self.create(new, parent=made.parent)
        return made

    async def log(self, id: str) -> list[checkpoints.LogRow]:
        """A layer's chain, newest first: when each layer was made, and how large it is."""
        own = (await self.get_metadata(id)).metadata
        found = [checkpoints.row(id, own, await self.usage(id))]
        for each in checkpoints.chain(id, own)[1:]:
            metadata = (await self.get_metadata(each)).metadata
            found.append(checkpoints.row(each, metadata, await self.usage(each)))
        return found

    @asynccontextmanager
    async def attempt(self, id: str, as_: str = "") -> AsyncIterator[str]:
        """Checkpoint a layer before the block, and roll it back unless the block ends well.

        Gives the block the name of the checkpoint. What the block changes in the layer stays, or is
        thrown away if the block raises or is cancelled. Raises UnmountBusy, also at the roll back,
        if the layer is in use.
        """
        name = (await self.checkpoint_next(id, as_)).parent
        try:
            yield name
        except BaseException:
            await self._waits.finish(lambda: self.rollback(id))
            raise

    # --- how a call is made -------------------------------------------------------------------

    async def call(
        self, method: str, params: dict[str, object], *, fd: int | None = None
    ) -> dict[str, object]:
        """Any method by name, its result object as it came; `fd` is sent along, not closed."""
        id = f"{os.getpid()}:{method}#{next(self._numbers)}"
        link = self._take() or await _connect(self.path, self._waits)
        try:
            reply = match(await link.exchange(encode_request(id, method, params), fd), id)
        except BaseException:
            # a late answer must not be taken for that of another call
            link.close()
            raise
        if self._closed or len(self._idle) >= _KEPT:
            link.close()
        else:
            self._idle.append(link)
        if reply.error:
            raise reply.error
        return reply.result

    async def _ask(self, request: Request[T], fd: int | None = None) -> T:
        found = parsing.parse(
            request.result, await self.call(request.method, request.params, fd=fd)
        )
        request.judge(found)
        return found

    def _take(self) -> "_Link | None":
        if self._closed:
            raise self._waits.closed()
        while self._idle:
            if (link := self._idle.pop()).usable():
                return link
            link.close()
        return None


async def _connect(path: str, waits: Waits) -> "_Link":
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with reachable(path) as short:
            while True:
                try:
                    sock.connect(short)
                except BlockingIOError:
                    # the backlog is full; a non-blocking connect(2) does not wait for room
                    await waits.sleep(_CONNECT_PAUSE)
                else:
                    return _Link(sock, waits)
    except OSError as error:
        sock.close()
        raise unreachable(path, error) from error
    except BaseException:
        sock.close()
        raise


class _Link:
    """One connection; one call at a time."""

    def __init__(self, sock: socket.socket, waits: Waits) -> None:
        self._sock = sock
        self._waits = waits
        self._lines = LineSplitter()

    def close(self) -> None:
        self._sock.close()

    def usable(self) -> bool:
        """Whether an idle connection is still open: the daemon may have ended."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    async def exchange(self, frame: bytes, fd: int | None) -> Reply:
        """Send a call and wait for its answer. Raises ConnectionLost."""
        # the daemon's last answer says more than the broken pipe
        with suppress(BrokenPipeError, ConnectionResetError):
            await self._send(memoryview(frame), fd)
        return await self._receive()

    async def _send(self, rest: memoryview, fd: int | None) -> None:
        ancillary = descriptor(fd)
        while rest:
            try:
                rest = rest[self._sock.sendmsg([rest], ancillary, socket.MSG_NOSIGNAL) :]
                ancillary = []
            except BlockingIOError:
                await self._waits.writable(self._sock)

    async def _receive(self) -> Reply:
        while True:
            await self._waits.readable(self._sock)
            try:
                data = self._sock.recv(READ_SIZE)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                data = b""
            if not data:
                raise ConnectionLost("the daemon closed the connection before it answered")
            for line in self._lines.feed(data):
                return decode_reply(line)
