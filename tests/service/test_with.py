"""`aufsctl with`: a command of the host while a layer is mounted, and what is left after it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aufsd_client import Client
from tests.archives import tar
from tests.daemon import Daemon, eventually

pytestmark = pytest.mark.service


@pytest.fixture(autouse=True)
def _layers(client: Client) -> None:
    client.create("base")
    client.apply_diff("base", tar({"file": b"content"}))
    client.create("work", parent="base")


def started(served: Daemon, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "aufsd_client.cli.__main__", "--socket", served.socket]
    return subprocess.Popen(
        [*command, "with", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ran(served: Daemon, *words: str) -> tuple[int, str, str]:
    with started(served, *words) as process:
        out, err = process.communicate()
    return process.returncode, out, err


def test_the_command_has_the_path_and_the_layer_is_unmounted_after_it(
    served: Daemon, client: Client
) -> None:
    assert ran(served, "work", "--", "cat", "{}/file") == (0, "content", "")
    assert client.mounts().mounts == []
    shell = 'touch "$AUFSD_LAYER_PATH/new"'
    assert ran(served, "work", "--", "sh", "-c", shell) == (0, "", "")
    assert [change.path for change in client.iter_changes("work")] == ["/new"]


@pytest.mark.parametrize(("shell", "status"), [("exit 7", 7), ("kill -9 $$", 137)])
def test_the_status_is_the_commands(
    served: Daemon, client: Client, shell: str, status: int
) -> None:
    assert ran(served, "work", "--", "sh", "-c", shell) == (status, "", "")
    assert client.mounts().mounts == []


def test_a_read_only_layer_takes_no_write(served: Daemon) -> None:
    status, _, err = ran(served, "work", "--ro", "--", "touch", "{}/new")
    assert status == 1
    assert "Read-only file system" in err


def test_what_is_no_command_and_what_is_no_layer_leave_nothing(
    served: Daemon, client: Client
) -> None:
    status, _, err = ran(served, "work", "--", "no-such-command")
    assert (status, err) == (1, "aufsctl: there is no command no-such-command\n")
    assert ran(served, "none", "--", "true")[0] == 4
    assert client.mounts().mounts == []


def test_signals_go_to_the_command(served: Daemon, client: Client, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    shell = f"trap 'exit 9' TERM; touch {ready}; while :; do sleep 0.1; done"
    with started(served, "work", "--", "sh", "-c", shell) as process:
        eventually(ready.exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 9
    assert client.mounts().mounts == []


def test_a_killed_one_leaves_no_reference(served: Daemon, client: Client, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with started(served, "work", "--", "sh", "-c", f"touch {ready}; sleep 0.5") as process:
        eventually(ready.exists)
        assert client.mounts().mounts[0].references == 1
        process.kill()
        process.wait()
    eventually(lambda: client.mounts().mounts == [])
