"""The daemon as a process to be measured, what it is asked, and the namespace it runs in."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aufsd_client import Client

READY_WITHIN = 60.0  # seconds


@dataclass(slots=True)
class Daemon:
    """`aufsd serve` over DIRECTORY/store; `prefix` is a command that runs it, for a namespace.

    `state` is on a tmpfs, as /run is: the table of mounts is there, and the log.
    """

    directory: Path
    state: Path
    flags: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    process: "subprocess.Popen[bytes] | None" = field(default=None)

    @property
    def socket(self) -> str:
        """The path of the control socket."""
        return str(self.directory / "control")

    @property
    def root(self) -> Path:
        """The store."""
        return self.directory / "store"

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        assert self.process is not None
        return self.process.pid

    def start(self) -> float:
        """Start it; the seconds from exec to READY=1."""
        self.directory.mkdir(exist_ok=True)
        address = self.directory / "notify"
        address.unlink(missing_ok=True)
        command = [
            *self.prefix,
            *(sys.executable, "-m", "aufsd", "serve", "--root", str(self.root)),
            *("--state-dir", str(self.state), "--socket", self.socket),
            *("--monitor-socket", str(self.directory / "monitor"), *self.flags),
        ]
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
            (self.state / "log").open("ab") as log,
        ):
            ready.bind(str(address))
            ready.settimeout(0.1)
            environment = {**os.environ, "NOTIFY_SOCKET": str(address)}
            began = time.perf_counter()
            self.process = subprocess.Popen(command, stderr=log, env=environment)
            while self.process.poll() is None and time.perf_counter() - began < READY_WITHIN:
                with suppress(TimeoutError):
                    if b"READY=1" in ready.recv(4096):
                        return time.perf_counter() - began
        self.process.kill()
        self.process = None
        raise RuntimeError(f"the daemon does not start: {(self.state / 'log').read_text()}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it and wait; its mounts stay."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    def client(self) -> Client:
        """The client library, connected to it."""
        return Client(self.socket)


@contextmanager
def daemon(directory: Path, *flags: str, prefix: tuple[str, ...] = ()) -> Iterator[Daemon]:
    """A started daemon, ended with all its mounts taken down."""
    with tempfile.TemporaryDirectory(prefix="aufsd-bench-", dir="/dev/shm") as state:
        made = Daemon(directory, Path(state), flags, prefix)
        try:
            made.start()
            yield made
        finally:
            if made.process is not None:
                try:
                    with made.client() as client:
                        client.cleanup()
                finally:
                    made.stop()


@contextmanager
def namespace() -> Iterator[tuple[str, ...]]:
    """A mount namespace that lasts as long as the block; the command prefix that enters it."""
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        yield ("nsenter", f"--mount=/proc/{holder.pid}/ns/mnt")
    finally:
        holder.kill()
        holder.communicate()


class Line:
    """A connection that asks with lines made before: as little of a client as there can be."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)

    def ask(self, line: bytes) -> bytes:
        """Send one line, and wait for the one that comes back."""
        self.sock.sendall(line)
        answer = self.sock.recv(65536)
        while not answer.endswith(b"\n"):
            answer += self.sock.recv(65536)
        return answer

    def close(self) -> None:
        """Hang up."""
        self.sock.close()


def request(method: str, **params: Any) -> bytes:
    """A call as a line."""
    call = {"jsonrpc": "2.0", "method": method, "params": params, "id": "bench#1"}
    return json.dumps(call).encode() + b"\n"


def require_result(answer: bytes) -> dict[str, Any]:
    """The result of a call that has to succeed: what fails fast must not be taken for fast."""
    message = json.loads(answer)
    if "result" not in message:
        raise RuntimeError(f"a call failed: {message}")
    found: dict[str, Any] = message["result"]
    return found
