"""What README.md says a terminal shows is what one shows.

`AUFSD_RECORD=1` writes it there anew.
"""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.docs.blocks import CHECKOUT, block_with
from tests.docs.test_blocks import SESSION, small_root

pytestmark = pytest.mark.service

# sizes, ages and digests are of one machine and one moment
_OF_ONE_RUN = [
    (re.compile(r"\b[0-9.]+ [kM]?B\b"), "SIZE"),
    (re.compile(r"\b[0-9]+ (s|min)\b"), "AGE"),
    (re.compile(r"sha256-[0-9a-f]{12}"), "ID"),
    (re.compile(r"\b[0-9]+ inodes\b|\b[0-9]+$", re.MULTILINE), "COUNT"),
    (re.compile(r" +"), " "),
]


def shown(commands: str, served: Daemon, directory: Path) -> str:
    """A terminal in which somebody types the commands, one after the other."""
    script = directory / "session"
    typed = (f"cat <<'EOF'\n$ {line}\nEOF\n{line}\n" for line in commands.splitlines())
    script.write_text("".join(typed))
    master, slave = pty.openpty()
    environment = {
        **os.environ,
        "AUFSD_SOCKET": served.socket,
        "NO_COLOR": "1",
        "TERM": "dumb",
        "COLUMNS": "100",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with subprocess.Popen(
        ["bash", "-e", str(script)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=directory,
        env=environment,
    ) as process:
        os.close(slave)
        out = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # EIO: nobody has the other end any more
                break
            out += piece
    os.close(master)
    assert process.returncode == 0, out
    return out.decode().replace("\r\n", "\n")


def alike(text: str) -> str:
    for pattern, word in _OF_ONE_RUN:
        text = pattern.sub(word, text)
    return text


def test_the_session_of_the_readme_is_what_a_terminal_shows(served: Daemon, tmp_path: Path) -> None:
    small_root(tmp_path / "image.tar", tmp_path / "root")
    block = block_with(SESSION)
    found = shown(block.commands, served, tmp_path)
    if os.environ.get("AUFSD_RECORD"):
        page = CHECKOUT / "README.md"
        page.write_text(page.read_text().replace(block.text, found))
    else:
        assert alike(found) == alike(block.text)
