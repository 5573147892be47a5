"""`aufsctl run`: a command in a throw-away layer, and what is left when anything ends."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from aufsd_client import Client
from tests.daemon import Daemon, eventually

pytestmark = pytest.mark.service

AUFSCTL = str(Path(sys.executable).parent / "aufsctl")
PROGRAMS = ("/bin/sh", "/bin/cat", "/bin/sleep", "/usr/bin/id", "/bin/rm", "/usr/bin/env")

RUNTIMES = [
    pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"needs {name}"))
    for name in ("bwrap", "unshare")
]


@pytest.fixture(scope="module")
def root_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system with a shell and a few programs."""
    made = tmp_path_factory.mktemp("root")
    for name in ("proc", "dev", "tmp", "etc", "bin", "usr/bin"):
        (made / "tree" / name).mkdir(parents=True)
    (made / "tree/etc/passwd").write_text("root:x:0:0::/:/bin/sh\nbuild:x:1234:1235::/:/bin/sh\n")
    (made / "tree/gone").touch()
    os.symlink("/etc", made / "tree/link")
    with tarfile.open(made / "root.tar", "w") as archive:
        archive.add(made / "tree", ".")
        libraries = set()
        for program in PROGRAMS:
            archive.add(os.path.realpath(program), f".{program}")
            linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
            libraries |= set(re.findall(r"(/\S+) \(0x", linked.stdout))
        for library in sorted(libraries):
            archive.add(os.path.realpath(library), f".{library}")
    return made / "root.tar"


@pytest.fixture
def base(client: Client, root_tar: Path) -> Client:
    client.create("base")
    client.apply_diff("base", root_tar)
    return client


def command(served: Daemon, *words: str) -> list[str]:
    return [AUFSCTL, "--socket", served.socket, "run", *words]


def ran(served: Daemon, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(served, *words), capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture(params=RUNTIMES)
def by(request: pytest.FixtureRequest) -> str:
    return f"--runtime={request.param}"


def test_the_command_sees_its_root_and_its_status_comes_back(
    served: Daemon, base: Client, by: str
) -> None:
    done = ran(served, "base", by, "--rm", "--changes", "--env", "A=b", "--workdir", "/etc", "--",
               "sh", "-c", 'echo "$A $PWD $$"; echo x >/new; rm /gone; exit 7')  # fmt: skip
    out = done.stdout.split()
    assert (done.returncode, out[:2]) == (7, ["b", "/etc"])
    assert int(out[2]) < 100, "it has pids of its own"
    assert done.stderr.splitlines() == ["D /gone", "A /new"]
    assert [row.id for row in base.iter_layers()] == ["base"]
    assert base.mounts().mounts == []


def test_what_it_wrote_stays_in_its_layer(served: Daemon, base: Client, by: str) -> None:
    done = ran(served, "base", by, "--name", "mine", "--", "sh", "-c", "echo x >/new")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [change.path for change in base.iter_changes("mine")] == ["/new"]
    assert base.mounts().mounts == []
    assert ran(served, "base", by, "--name", "mine", "--", "sh").returncode == 1
    unnamed = ran(served, "mine", by, "--", "cat", "/new")
    assert unnamed.stdout == "x\n"
    assert re.search("aufsctl remove run-[0-9a-f]{12}", unnamed.stderr)


def test_a_read_only_root_is_that_and_leaves_nothing(served: Daemon, base: Client, by: str) -> None:
    done = ran(served, "base", by, "--ro", "--", "sh", "-c", "cat /etc/passwd; echo x >/new")
    assert done.stdout.startswith("root:")
    assert done.returncode != 0
    assert "Read-only" in done.stderr or "cannot create" in done.stderr
    assert [row.id for row in base.iter_layers()] == ["base"]


def test_what_is_bound_is_seen_and_what_leads_out_is_refused(
    served: Daemon, base: Client, by: str, tmp_path: Path
) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/file").write_text("from the host")
    source = tmp_path / "dir"
    done = ran(served, "base", by, "--rm", "--bind", f"{source}:/data/in", "--", "sh", "-c",
               "cat /data/in/file; echo back >/data/in/back")  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "from the host")
    assert (tmp_path / "dir/back").read_text() == "back\n"
    done = ran(served, "base", by, "--rm", "--bind", f"{source}:/data:ro", "--", "sh", "-c",
               "echo x >/data/more")  # fmt: skip
    assert done.returncode != 0
    assert not (tmp_path / "dir/more").exists()
    for bind, said in (
        (f"{source}:/link/x", "symbolic link"),
        (f"{source}:relative", "begin with a slash"),
        (f"{tmp_path}/none:/data", "there is no"),
    ):
        done = ran(served, "base", by, "--rm", "--bind", bind, "--", "sh")
        assert done.returncode == 1
        assert said in done.stderr
    assert ran(served, "base", by, "--bind", "x", "--", "sh").returncode == 2
    assert [row.id for row in base.iter_layers()] == ["base"]


@pytest.mark.parametrize(("user", "ids"), [("build", "1234 1235"), ("7:8", "7 8")])
def test_another_user(served: Daemon, base: Client, user: str, ids: str) -> None:
    done = ran(served, "base", "--rm", "--user", user, "--", "sh", "-c", "echo $(id -u) $(id -g)")
    assert done.stdout.strip() == ids


def test_a_user_that_there_is_not(served: Daemon, base: Client) -> None:
    done = ran(served, "base", "--rm", "--user", "nobody", "--", "sh")
    assert done.returncode == 1
    assert "no user nobody" in done.stderr


def started(served: Daemon, *words: str) -> "subprocess.Popen[str]":
    """A run whose command has said that it is there."""
    process = subprocess.Popen(command(served, *words), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_signal_goes_to_the_command(served: Daemon, base: Client, by: str) -> None:
    script = "trap 'echo told; exit 9' TERM; echo ready; while :; do sleep 0.1; done"
    process = started(served, "base", by, "--rm", "--", "sh", "-c", script)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "told\n"
    assert process.returncode == 9
    assert base.mounts().mounts == []


def test_killed_it_takes_the_command_and_the_mount_with_it(
    served: Daemon, base: Client, by: str
) -> None:
    script = "echo ready; exec sleep 1000"
    process = started(served, "base", by, "--name", "mine", "--", "sh", "-c", script)
    assert served.mounts() == ["mine"]
    process.kill()
    process.communicate()
    eventually(lambda: served.mounts() == [] and base.mounts().mounts == [])
    assert base.remove("mine").removed


def test_the_daemon_restarted_in_the_middle(served: Daemon, base: Client, by: str) -> None:
    script = "echo ready; read line; echo x >/new"
    process = subprocess.Popen(
        command(served, "base", by, "--name", "mine", "--", "sh", "-c", script),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    served.kill()
    served.start()
    process.communicate("go\n", timeout=60)
    assert process.returncode == 0
    with served.client() as again:
        assert [change.path for change in again.iter_changes("mine")] == ["/new"]
        assert again.mounts().mounts == []


def test_a_terminal_is_passed_on_and_ctrl_c_ends_it(served: Daemon, base: Client) -> None:
    words = command(served, "base", "--runtime=unshare", "--rm", "--", "sh", "-c",
                    "trap 'echo told; exit 9' INT; test -t 0 && echo ready; read line")  # fmt: skip
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(words[0], words)
    with os.fdopen(terminal, "rb", buffering=0) as file:
        assert file.readline() == b"ready\r\n"
        os.write(terminal, b"\x03")
        assert file.readline() == b"^Ctold\r\n"
        # a terminal that is closed hangs up
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert [row.id for row in base.iter_layers()] == ["base"]


def test_an_unknown_layer_is_not_found(served: Daemon, client: Client) -> None:
    done = ran(served, "nosuch", "--", "sh")
    assert done.returncode == 4
    assert list(client.iter_layers()) == []


def test_a_later_run_removes_what_a_killed_one_left(
    served: Daemon, base: Client, root_tar: Path
) -> None:
    """Only its own kind, and none that is in use or young: that may be of a run that begins."""
    made = {"run-rm-000000000001": 0, "run-rm-000000000002": 0, "run-rm-000000000003": 1}
    for id in (*made, "run-000000000004"):
        base.create(id, parent="base")
        if id != "run-rm-000000000002":
            old = Path(served.root, "layers", id)
            os.utime(old, (old.stat().st_atime, old.stat().st_mtime - 3600))
    base.get("run-rm-000000000003")
    served.stop()
    served.start()
    with served.client() as client:
        assert ran(served, "base", "--rm", "--", "/bin/sh", "-c", "exit 0").returncode == 0
        left = [row.id for row in client.iter_layers(prefix="run-")]
        client.cleanup()
    assert left == ["run-000000000004", "run-rm-000000000002", "run-rm-000000000003"]
