"""The daemon as a process, for tests: started, waited for, killed, and looked at from outside."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aufsd.kernel import mountinfo, syscalls
from aufsd_client import Client

READY_WITHIN = 300.0  # seconds; the machine may be an emulated one, and busy
EVENTUALLY = 30.0  # seconds


@dataclass
class Daemon:
    """One `aufsd serve` over the store at `root`; may be started again after it has ended."""

    directory: Path
    root: Path
    flags: tuple[str, ...] = ()
    # a command that runs the daemon, as its last arguments
    prefix: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    started: int = field(default=0)

    @property
    def socket(self) -> str:
        return str(self.directory / "a.sock")

    @property
    def monitor_socket(self) -> str:
        return str(self.directory / "m.sock")

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def command(self, *flags: str) -> list[str]:
        return [
            *self.prefix,
            *(sys.executable, "-m", "aufsd", "serve", "--root", str(self.root)),
            *("--state-dir", str(self.directory / "run")),
            *("--socket", self.socket, "--monitor-socket", self.monitor_socket),
            *(*self.flags, *flags),
        ]

    def start(self, *flags: str) -> "Daemon":
        """Start it and wait for READY=1."""
        self.started += 1
        address = str(self.directory / f"notify{self.started}")
        Path(address).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(address)
            ready.settimeout(0.1)
            with (self.directory / "log").open("ab") as log:
                self.process = subprocess.Popen(
                    self.command(*flags), stderr=log, env={**os.environ, "NOTIFY_SOCKET": address}
                )
            for _ in range(int(READY_WITHIN / 0.1)):
                try:
                    if b"READY=1" in ready.recv(4096):
                        return self
                except TimeoutError:
                    assert self.process.poll() is None, self.log
        raise AssertionError(f"not ready within {READY_WITHIN} s: {self.log}")

    def refused(self, *flags: str) -> tuple[int, str]:
        """Start it where it will not come up: its exit status and what it said."""
        done = subprocess.run(
            self.command(*flags), capture_output=True, text=True, timeout=READY_WITHIN, check=False
        )
        return done.returncode, done.stderr

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(READY_WITHIN)

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(READY_WITHIN)

    def client(self, *, timeout: float | None = 60.0) -> Client:
        return Client(self.socket, timeout=timeout)

    def mounts(self) -> list[str]:
        """Ids that are mounted, as the kernel says."""
        rows = mountinfo.mounted_under(str(self.root / "mnt"))
        return sorted(os.path.basename(row.mount_point) for row in rows)

    def descriptors(self) -> int:
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def eventually(condition: Callable[[], bool]) -> None:
    """Return once it holds; AssertionError if it never does. Another process is polled."""
    deadline = time.monotonic() + EVENTUALLY
    while not condition():
        assert time.monotonic() < deadline, f"not within {EVENTUALLY} s"
        time.sleep(0.01)


def archive_processes(pid: int) -> list[int]:
    """Below a daemon: the fork server, the first of its namespace, the two children that wait.

    A child of an earlier job ends a moment after that, and one that waits is forked later: so they
    have to be the same for two looks.
    """
    found: list[int] = []

    def all_there() -> bool:
        before = found.copy()
        found[:] = descendants(pid)
        return len(found) == 4 and found == before

    eventually(all_there)
    return found


def descendants(pid: int) -> list[int]:
    """The processes below one, parents before their children."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    children = list(map(int, text.split()))
    return [*children, *(below for child in children for below in descendants(child))]


@contextmanager
def daemon(
    directory: Path, *flags: str, root: Path | None = None, prefix: tuple[str, ...] = ()
) -> Iterator[Daemon]:
    """A started daemon; killed at the end, and what it left mounted is unmounted."""
    made = Daemon(directory, root or directory / "store", flags, prefix)
    try:
        yield made.start()
    finally:
        if made.process is not None and made.process.poll() is None:
            made.kill()
        for row in reversed(mountinfo.mounted_under(str(made.root / "mnt"))):
            syscalls.umount2(row.mount_point, syscalls.MNT_DETACH)
