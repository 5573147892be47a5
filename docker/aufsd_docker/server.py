"""HTTP/1.1 on a Unix socket for one dockerd: requests to the driver, bodies streamed both ways.

h11 does the protocol, without I/O of its own; so a tar of any size is never held in memory. The
protocol of plugins is POST of JSON, but for Diff (the answer's body is a tar) and ApplyDiff (the
request's is).
"""

import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, urlsplit

import h11
import msgspec
import structlog
import trio

from aufsd_client.errors import AufsdError
from aufsd_client.wire import ConnectionLost, DaemonUnreachable
from aufsd_docker.driver import Driver
from aufsd_docker.messages import MEDIA_TYPE, Answer, Arguments, decode, encode

log = structlog.get_logger(__name__)

_READ: Final = 64 << 10
# arguments are some hundred bytes; a tar is streamed
_LARGEST: Final = 1 << 20
# what a call may end with that is for Docker's user to read
_ERRORS: Final = (AufsdError, ConnectionLost, DaemonUnreachable, OSError)

Handler = Callable[[Arguments], Awaitable[Answer]]


@dataclass(slots=True)
class Connection:
    """One connection of dockerd's, which sends one request after the other."""

    stream: trio.SocketStream
    driver: Driver
    http: h11.Connection
    methods: Mapping[str, Handler]

    async def serve(self) -> None:
        """Answer until the peer is done, or breaks the protocol."""
        try:
            while True:
                request = await self._event()
                if not isinstance(request, h11.Request):
                    return
                await self._answer(request)
                if self.http.our_state is not h11.DONE or self.http.their_state is not h11.DONE:
                    # an answer came before the whole body was read: nothing more can be said here
                    return
                self.http.start_next_cycle()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        except h11.RemoteProtocolError as error:
            log.info("not HTTP", error=str(error))
            with suppress(h11.LocalProtocolError, trio.BrokenResourceError):
                await self._say(400, Answer(error=f"not a request: {error}"))
        finally:
            with trio.move_on_after(1, shield=True):
                await self.stream.aclose()

    async def _event(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self.http.next_event()
            if isinstance(event, h11.Event) or event is h11.PAUSED:
                return event
            self.http.receive_data(await self.stream.receive_some(_READ))

    async def _answer(self, request: h11.Request) -> None:
        target = urlsplit(request.target.decode("ascii", "replace"))
        log.debug("call", method=target.path)
        if target.path == "/GraphDriver.ApplyDiff":
            query = parse_qs(target.query)
            await self._apply_diff(query.get("id", [""])[0], query.get("parent", [""])[0])
            return
        handler = self.methods.get(target.path)
        try:
            call = decode(await self._body())
        except (msgspec.MsgspecError, ValueError) as error:
            await self._say(400, Answer(error=f"{target.path}: {error}"))
            return
        if target.path == "/GraphDriver.Diff":
            await self._diff(call)
        elif handler is None:
            await self._say(404, Answer(error=f"there is no method {target.path}"))
        else:
            await self._call(target.path, handler, call)

    async def _call(self, path: str, handler: Handler, call: Arguments) -> None:
        try:
            answer = await handler(call)
        except _ERRORS as error:
            log.info("refused", method=path, id=call.id, error=str(error))
            answer = Answer(error=str(error))
        await self._say(200, answer)

    async def _body(self) -> bytes:
        """A whole body. Raises ValueError if it is longer than arguments are."""
        parts: list[bytes] = []
        length = 0
        while isinstance(event := await self._event(), h11.Data):
            length += len(event.data)
            if length > _LARGEST:
                raise ValueError(f"arguments of more than {_LARGEST} bytes")
            parts.append(bytes(event.data))
        return b"".join(parts)

    async def _say(self, status: int, answer: Answer) -> None:
        body = encode(answer)
        headers = [("Content-Type", MEDIA_TYPE), ("Content-Length", str(len(body)))]
        await self._send(h11.Response(status_code=status, headers=headers))
        await self._send(h11.Data(data=body))
        await self._send(h11.EndOfMessage())

    async def _send(self, event: h11.Event) -> None:
        data = self.http.send(event)
        if data:
            await self.stream.send_all(data)

    # --- the two tars -------------------------------------------------------------------------

    async def _diff(self, call: Arguments) -> None:
        """Send the layer's tar, chunked. What fails after the first byte breaks the connection."""
        read_end, write_end = os.pipe()
        failure: list[Exception] = []

        async def write() -> None:
            try:
                await self.driver.diff(call, write_end)
            except _ERRORS as error:
                failure.append(error)
            finally:
                os.close(write_end)

        async with trio.open_nursery() as nursery, trio.lowlevel.FdStream(read_end) as tar:
            nursery.start_soon(write)
            first = await tar.receive_some(_READ)
            if not first:
                # the pipe is closed after the reason is known, and a tar is never empty
                await self._say(500, Answer(error=str(failure[0])))
                return
            await self._send(
                h11.Response(status_code=200, headers=[("Content-Type", "application/x-tar")])
            )
            data = first
            while data:
                await self._send(h11.Data(data=bytes(data)))
                data = await tar.receive_some(_READ)
        if failure:
            log.warning("diff broke off", id=call.id, error=str(failure[0]))
            # without the last chunk Docker knows that it is not whole
            raise trio.BrokenResourceError from failure[0]
        await self._send(h11.EndOfMessage())

    async def _apply_diff(self, id: str, parent: str) -> None:
        """Unpack the request's body as it comes. What is refused is answered before its end."""
        read_end, write_end = os.pipe()
        answers: list[Answer] = []

        async def apply(scope: trio.CancelScope) -> None:
            try:
                answers.append(await self.driver.apply_diff(id, parent, read_end))
            except _ERRORS as error:
                log.info("refused", method="ApplyDiff", id=id, error=str(error))
                answers.append(Answer(error=str(error)))
            finally:
                os.close(read_end)
            # what comes after that is for nobody
            scope.cancel()

        async with trio.open_nursery() as nursery:
            feeding = trio.CancelScope()
            nursery.start_soon(apply, feeding)
            with feeding:
                async with trio.lowlevel.FdStream(write_end) as tar:
                    with suppress(trio.BrokenResourceError):
                        while isinstance(event := await self._event(), h11.Data):
                            await tar.send_all(event.data)
        await self._say(200, answers[0])


async def serve(listeners: list[trio.SocketListener], driver: Driver) -> None:
    """Serve until it is cancelled; a connection that is in a call ends with it."""
    methods = _methods(driver)

    async def handle(stream: trio.SocketStream) -> None:
        await Connection(stream, driver, h11.Connection(h11.SERVER), methods).serve()

    await trio.serve_listeners(handle, listeners)


def _methods(driver: Driver) -> dict[str, Handler]:
    async def activate(_: Arguments) -> Answer:
        return Answer(implements=["GraphDriver"])

    named: dict[str, Handler] = {
        "Init": driver.init,
        "Cleanup": driver.cleanup,
        "Create": driver.create,
        "CreateReadWrite": driver.create,
        "Remove": driver.remove,
        "Get": driver.get,
        "Put": driver.put,
        "Exists": driver.exists,
        "Capabilities": driver.capabilities,
        "Status": driver.status,
        "GetMetadata": driver.metadata,
        "Changes": driver.changes,
        "DiffSize": driver.diff_size,
    }
    return {
        "/Plugin.Activate": activate,
        **{f"/GraphDriver.{name}": handler for name, handler in named.items()},
    }
