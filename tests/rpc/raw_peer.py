"""A peer that speaks bytes: what a client library would not send can be sent with it."""

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any, Self

import trio

PATIENCE = 30.0  # seconds until a test that waits for something gives up


def line(method: str, number: object = 1, /, **params: object) -> bytes:
    """A call, with its newline."""
    message = {"jsonrpc": "2.0", "method": method, "params": params, "id": number}
    return json.dumps(message).encode() + b"\n"


def notification(method: str, /, **params: object) -> bytes:
    """A call that is not answered."""
    return json.dumps({"jsonrpc": "2.0", "method": method, "params": params}).encode() + b"\n"


class RawPeer:
    """One connection to the server under test."""

    def __init__(self, path: Path | str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.connect(os.fspath(path))
        except OSError:
            self.sock.close()
            raise
        self.sock.setblocking(False)
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    async def send(self, data: bytes, *fds: int) -> None:
        """Send it all; descriptors with the first sendmsg(2)."""
        rest = memoryview(data)
        payload = struct.pack(f"{len(fds)}i", *fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, payload)] if fds else []
        with trio.fail_after(PATIENCE):
            while rest:
                try:
                    rest = rest[self.sock.sendmsg([rest], ancillary) :]
                    ancillary = []
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.sock)

    async def receive_line(self) -> bytes:
        """The next line without its newline; b"" at the end."""
        with trio.fail_after(PATIENCE):
            while b"\n" not in self._buffer:
                await trio.lowlevel.wait_readable(self.sock)
                data = self.sock.recv(1 << 16)
                if not data:
                    assert not self._buffer, "the connection ended within a line"
                    return b""
                self._buffer += data
        found, _, self._buffer = self._buffer.partition(b"\n")
        return found

    async def receive(self) -> Any:
        """The next value."""
        return json.loads(await self.receive_line())

    async def ask(self, method: str, /, **params: object) -> Any:
        """Call, and wait for the answer."""
        await self.send(line(method, **params))
        return await self.receive()

    async def settle(self) -> None:
        """Wait until everything that was sent before has been read and begun."""
        answer = await self.ask("ping")
        assert answer["result"] == {}

    def has_answer(self) -> bool:
        """Whether something was received that no `receive` took."""
        if self._buffer:
            return True
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False


def code(answer: Any) -> int:
    """The code of an error answer."""
    found = answer["error"]["code"]
    assert isinstance(found, int)
    return found


def name(answer: Any) -> str:
    """The name of an error answer."""
    return str(answer["error"]["data"]["name"])
