"""The daemon starts, reloads and stays, whatever it is started with; else it says one sentence."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from aufsd_client import Client
from tests.daemon import READY_WITHIN, Daemon, daemon, eventually

pytestmark = pytest.mark.service


def check_of(client: Client, name: str) -> tuple[str, str]:
    (found,) = [check for check in client.health().checks if check.name == name]
    return found.status, found.detail


@pytest.mark.parametrize(
    "text",
    [
        'read_users = ["²"]',
        'read_users = ["a\\u0000b"]',
        "drain_timeout = nan",
        "x = " + "[" * 5000,
    ],
)
def test_a_bad_file_is_not_taken_at_a_reload_and_the_daemon_stays(
    tmp_path: Path, text: str
) -> None:
    file = tmp_path / "aufsd.toml"
    file.touch()
    with daemon(tmp_path, "--config", str(file)) as served, served.client() as client:
        assert served.process is not None
        file.write_text(f"{text}\n")
        served.process.send_signal(signal.SIGHUP)
        eventually(lambda: "configuration is not reloaded" in served.log)
        status, detail = check_of(client, "configuration")
        assert status == "degraded"
        assert detail.startswith(f"the new configuration was not taken: {file}: ")
        file.write_text("")
        served.process.send_signal(signal.SIGHUP)
        eventually(lambda: "configuration reloaded" in served.log)
        assert check_of(client, "configuration")[0] == "ok"
        assert "Traceback" not in served.log
    assert Daemon(tmp_path, tmp_path / "store", ("--config", str(file))).root.is_dir()


def test_without_a_standard_error_it_runs_and_writes_its_log_into_nothing(tmp_path: Path) -> None:
    """Else the lock of the store would be its standard error."""
    made = Daemon(tmp_path, tmp_path / "store")
    close = (
        "import os, sys; [os.close(fd) for fd in (0, 1, 2)]; os.execv(sys.argv[1], sys.argv[1:])"
    )
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(READY_WITHIN)
        process = subprocess.Popen(
            [sys.executable, "-c", close, *made.command()],
            env={**os.environ, "NOTIFY_SOCKET": str(address)},
        )
        while "READY=1" not in manager.recv(4096).decode():
            assert process.poll() is None
        opened = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in range(3)]
        assert opened == ["/dev/null"] * 3
        process.terminate()
        assert process.wait(READY_WITHIN) == 0


def test_an_interrupt_is_heard_once_and_a_second_breaks_nothing(served: Daemon) -> None:
    assert served.process is not None
    for _ in range(50):
        served.process.send_signal(signal.SIGINT)
    assert served.process.wait(READY_WITHIN) == 0
    assert "Traceback" not in served.log
    assert '"event":"stopped"' in served.log


def test_a_socket_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(tmp_path / "a.sock"))
        status, said = Daemon(tmp_path, tmp_path / "store").refused()
    assert status == 1
    assert said.splitlines()[-1] == f"aufsd: {tmp_path}/a.sock: Protocol wrong type for socket"


def test_a_lock_that_a_predecessor_holds_is_waited_for_under_a_service_manager(
    served: Daemon, tmp_path: Path
) -> None:
    status, said = Daemon(tmp_path, served.root).refused("--socket", str(tmp_path / "other"))
    assert (status, "another process serves" in said) == (3, True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(READY_WITHIN)
        process = subprocess.Popen(
            served.command(), env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        )
        heard = ""
        while "STATUS=waiting: another process serves" not in heard:
            heard = manager.recv(4096).decode()
        served.kill()
        while "READY=1" not in heard:
            heard = manager.recv(4096).decode()
        process.terminate()
        assert process.wait(READY_WITHIN) == 0


@pytest.mark.mounts
def test_with_few_descriptors_a_start_says_so_in_one_sentence_and_changes_nothing(
    served: Daemon, tmp_path: Path
) -> None:
    assert served.stop() == 0
    for most in (7, 10, 13, 16, 19):
        few = Daemon(tmp_path, served.root, prefix=("prlimit", f"--nofile={most}:{most}"))
        status, said = few.refused()
        assert (status, "Traceback" in said) == (1, False)
        *lines, last = said.splitlines()
        assert all(line.startswith("{") for line in lines)
        assert last.startswith("aufsd: ")
        assert last.endswith("Too many open files; raise LimitNOFILE= (ulimit -Hn)")
    served.start()
    with served.client() as client:
        assert client.health().status == "ok"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("serve",), 1, "aufsd: only root can mount: "),
        (
            ("check", "--root", "{closed}/store"),
            1,
            "aufsd: {closed}/store/layers/.: Permission denied",
        ),
        (("check", "--root", "{open}"), 2, "aufsd: {open}: no store lies there"),
    ],
)
def test_an_ordinary_user_is_told_what_is_missing(
    tmp_path: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    places = {"closed": str(tmp_path / "closed"), "open": "/"}
    (tmp_path / "closed").mkdir(0o700)
    # an interpreter below /root is nobody else's: the command runs in one that has given root up
    script = (
        "import os, sys; from aufsd.__main__ import main; import aufsd.archive.offline;"
        "import aufsd.store.check, aufsd.store.opening;"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "sys.exit(main(sys.argv[1:]))"
    )
    given = [argument.format(**places) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", script, *given], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.startswith(said.format(**places))) == (status, True), done


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_an_output_that_cannot_be_written_is_one_sentence(redirection: str) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -m aufsd probe {redirection}', sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("aufsd: ")
    assert len(done.stderr.splitlines()) == 1
