"""How far an archive is, on a terminal, while aufsctl waits for it."""

import os
import pty
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from aufsd_client import Client
from tests.archives import tar
from tests.daemon import Daemon

pytestmark = pytest.mark.service

ARCHIVE = tar({f"file{number}": os.urandom(100_000) for number in range(300)})
_PIECE = 1_000_000


def aufsctl(served: Daemon, *words: str) -> list[str]:
    return [sys.executable, "-m", "aufsd_client.cli.__main__", "--socket", served.socket, *words]


class Terminal:
    """Standard error of a command; what it shows is read as it comes."""

    def __init__(self) -> None:
        self._master, self.slave = pty.openpty()
        os.set_blocking(self._master, False)
        self.shown = ""

    def says(self, word: str) -> bool:
        """Whether it has shown that by now."""
        # EAGAIN: nothing new; EIO: nobody has the other end any more
        with suppress(OSError):
            self.shown += os.read(self._master, 65536).decode()
        return word in self.shown

    def close(self) -> None:
        os.close(self._master)


def test_an_archive_from_a_pipe_shows_its_bytes(served: Daemon, client: Client) -> None:
    client.create("base")
    screen = Terminal()
    with subprocess.Popen(
        aufsctl(served, "apply", "base"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=screen.slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "150"},
    ) as process:
        os.close(screen.slave)
        assert process.stdin is not None
        # the archive's process tells now and then how far it is, while it reads
        for start in range(0, len(ARCHIVE), _PIECE):
            process.stdin.write(ARCHIVE[start : start + _PIECE])
            process.stdin.flush()
            if not screen.says("MB/s"):
                time.sleep(0.2)
        out, _ = process.communicate()
    assert "apply_diff base" in screen.shown
    assert "MB/s" in screen.shown
    screen.close()
    assert process.returncode == 0
    assert out.startswith(b"300 entries, ")


def test_without_a_terminal_nothing_is_shown(served: Daemon, client: Client) -> None:
    client.create("base")
    command = aufsctl(served, "apply", "base")
    done = subprocess.run(command, input=ARCHIVE, capture_output=True, check=True)
    assert done.stderr == b""
