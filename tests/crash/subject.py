"""The daemon that is killed: forked by the zygote, found dead by its pidfd, started again."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aufsd.kernel import mountinfo, syscalls
from aufsd_client import Client

WITHIN = 60.0  # seconds


@dataclass
class Zygote:
    """The process that daemons are forked from."""

    process: subprocess.Popen[str]

    def fork(self, argv: list[str], *, log: Path, notify: str, gate: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"argv": argv, "log": str(log), "notify": notify, "gate": gate}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def zygote() -> Iterator[Zygote]:
    """A zygote; at the end it is gone, and its daemons with it."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.crash.zygote"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Zygote(process)
        assert process.stdin is not None
        process.stdin.close()


@dataclass
class Subject:
    """One daemon over the store in `directory`; started as often as it dies."""

    zygote: Zygote
    directory: Path
    pid: int = 0
    pidfd: int = -1
    _ready: socket.socket | None = None

    @property
    def root(self) -> Path:
        return self.directory / "store"

    @property
    def _gate(self) -> Path:
        return self.directory / "gate"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def start(self, *flags: str, held: bool = False) -> None:
        """Have it forked; `held` until `release`."""
        self.let_go()
        notify = self.directory / "notify"
        notify.unlink(missing_ok=True)
        self._ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ready.bind(str(notify))
        argv = ["serve", "--root", str(self.root), "--state-dir", str(self.directory / "run")]
        argv += [
            "--socket",
            str(self.directory / "a"),
            "--monitor-socket",
            str(self.directory / "m"),
        ]
        log = self.directory / "log"
        gate = str(self._gate) if held else ""
        if held and not self._gate.exists():
            os.mkfifo(gate)
        self.pid = self.zygote.fork([*argv, *flags], log=log, notify=str(notify), gate=gate)
        self.pidfd = os.pidfd_open(self.pid)

    def release(self) -> None:
        """Let a held one begin."""
        os.close(os.open(self._gate, os.O_WRONLY))

    def ready(self) -> bool:
        """Wait until it is ready, or dead: False."""
        assert self._ready is not None
        while True:
            ready = self._ready.fileno()
            found, _, _ = select.select([ready, self.pidfd], [], [], WITHIN)
            assert found, f"neither ready nor dead: {self.log}"
            if ready not in found:
                return False
            if b"READY=1" in self._ready.recv(4096):
                return True

    def read_notices(self) -> None:
        """Take what it has told the service manager since it was ready."""
        assert self._ready is not None
        while select.select([self._ready], [], [], 0)[0]:
            self._ready.recv(4096)

    def died(self, within: float = WITHIN) -> bool:
        """Whether it has ended, or does so within these seconds."""
        return bool(select.select([self.pidfd], [], [], within)[0])

    def kill(self) -> None:
        """kill -9, and wait."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        assert self.died()

    def client(self) -> Client:
        return Client(str(self.directory / "a"), timeout=WITHIN)

    def let_go(self) -> None:
        """Kill it if it lives, and close what belongs to it."""
        if self.pidfd >= 0:
            if not self.died(0):
                self.kill()
            os.close(self.pidfd)
            self.pidfd = -1
        if self._ready is not None:
            self._ready.close()
            self._ready = None


@contextmanager
def subject(zygote: Zygote, directory: Path) -> Iterator[Subject]:
    """A subject, ready; at the end it is dead, and nothing of its store is mounted."""
    directory.mkdir()
    made = Subject(zygote, directory)
    try:
        made.start()
        assert made.ready(), made.log
        yield made
    finally:
        made.let_go()
        for row in reversed(mountinfo.mounted_under(str(made.root))):
            syscalls.umount2(row.mount_point, syscalls.MNT_DETACH)
