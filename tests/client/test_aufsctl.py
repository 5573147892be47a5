"""aufsctl against a real server: what it prints, and how it exits."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aufsd.rpc.methods import TABLE
from aufsd.rpc.server import ServerSettings
from aufsd_client import __version__, errors
from aufsd_client.cli import session, show
from aufsd_client.cli.__main__ import every_verb, run
from aufsd_client.cli.report import describe
from tests.client.threaded import Daemon, running
from tests.rpc.fake_driver import TAR
from tests.strangers import let_in

Capture = pytest.CaptureFixture[str]


class Command:
    """Runs the command in this process, against one daemon."""

    def __init__(self, socket: str, capture: Capture) -> None:
        self.socket = socket
        self._capture = capture

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        self._capture.readouterr()
        status = run(["--socket", self.socket, *arguments])
        out, err = self._capture.readouterr()
        return status, out, err.rstrip("\n")


@pytest.fixture
def command(daemon: Daemon, capfd: Capture) -> Command:
    daemon.driver.parents |= {"base": None, "a": None, "slow": None}
    return Command(daemon.path, capfd)


def test_every_method_has_a_verb() -> None:
    methods = {name.replace("_", "-").removeprefix("rpc.") for name in TABLE}
    assert methods < set(every_verb().commands)
    assert set(every_verb().commands) - methods == {
        "inspect",
        "apply",
        "completion",
        "df",
        "export",
        "fork",
        "load",
        "log",
        "prune",
        "run",
        "top",
        "tree",
        "with",
    }


@pytest.mark.parametrize("verb", sorted(every_verb().commands))
def test_every_verb_explains_itself(verb: str, capfd: Capture) -> None:
    assert run([verb, "--help"]) == 0
    assert f"Usage: aufsctl {verb}" in capfd.readouterr().out


OUTPUT: dict[str, tuple[int, str]] = {
    "version": (
        0,
        f"aufsctl   {__version__}\naufsd     0.0\nAPI       1\nBackend   fake\nFeatures  none\n",
    ),
    "ping": (0, "the daemon answers\n"),
    "metrics": (0, "aufsd_up 1\n"),
    "exists a": (0, "yes\n"),
    "exists b": (4, "no\n"),
    "create b --parent a": (0, "created b\n"),
    "remove a": (0, "removed a\n"),
    "remove b": (4, ""),
    "get a": (0, "/mnt/a\n"),
    "put a": (0, "a: 0 references left, not mounted\n"),
    "usage a": (0, "4.1 kB, 2 inodes\n"),
    "seal a": (0, "sealed a: 4.1 kB, 2 inodes\n"),
    "checkpoint a b": (0, "a stands on b now\n"),
    "checkpoint a": (0, "a stands on a.1 now\n"),
    "fork a c": (0, "a and c stand on a.1 now\n"),
    "rollback a b": (0, "a is empty, on b\n"),
    "squash a b": (0, "a stands on b now\nremoved: c\nkept: d\n"),
    "diff-size a": (0, "18 bytes (18 B)\n"),
    "changes a": (0, "A /0\nA /1\nA /2\nA /3\nA /4\nD /\\udcff\n"),
    "changes a --limit 2": (0, "A /0\nA /1\n"),
    "changes a --after 5": (0, "D /\\udcff\n"),
    "mounts": (0, "nothing is mounted\n"),
    "convert a --to aufs": (0, "a: nothing to convert\n"),
    "convert a --to overlay": (0, "a: converted\n"),
    "cleanup": (5, ""),
}


@pytest.mark.parametrize("words", OUTPUT)
def test_a_verb_prints_its_result(command: Command, words: str) -> None:
    status, out, _ = command(*words.split())
    assert (status, out) == OUTPUT[words]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("status", ["Driver", "Root Dir", "/nowhere"]),
        ("health", ["CHECK", "STATUS", "space", "ok", "plenty", "the daemon is ok"]),
        ("list", ["ID", "PARENT", "base", "slow"]),
        ("inspect a", ["content", "/diff/a"]),
        ("get-metadata a", ["content", "/diff/a"]),
        ("holders a", ["PID", "init", "cwd"]),
        ("check a", ["PROBLEM", "stray", "no"]),
        ("discover", ['"openrpc"', '"1.3.2"']),
    ],
)
def test_a_table_has_what_was_asked_for(command: Command, words: str, parts: list[str]) -> None:
    status, out, err = command(*words.split())
    assert (status, err) == (0, "")
    for part in parts:
        assert part in out


def test_mounts_names_who_holds_them(command: Command) -> None:
    command("get", "a")
    status, out, _ = command("mounts")
    assert status == 0
    for part in ("/mnt/a", "fake", "rw", "init (1)"):
        assert part in out


@pytest.mark.parametrize(
    ("words", "method", "params"),
    [
        ("version", "version", {}),
        ("status", "status", {}),
        ("health", "health", {}),
        ("exists a", "exists", {"id": "a"}),
        ("list --limit 1", "list", {"limit": 1}),
        ("changes a --limit 1 --after 1", "changes", {"id": "a", "limit": 1, "after": "1"}),
        ("inspect a", "get_metadata", {"id": "a"}),
        ("remove nothing", "remove", {"id": "nothing"}),
        ("mounts", "mounts", {}),
        ("check", "check", {}),
        ("discover", "rpc.discover", {}),
    ],
)
def test_json_is_the_result_object_as_it_is(
    daemon: Daemon, command: Command, words: str, method: str, params: dict[str, object]
) -> None:
    _, out, _ = command("--json", *words.split())
    assert out.count("\n") == 1
    with session.Session(daemon.path, False, None).client() as client:
        assert json.loads(out) == client.call(method, params)


@pytest.mark.parametrize(
    ("words", "status", "said", "hint"),
    [
        ("get none", 4, "there is no layer none", "`aufsctl list` shows the layers"),
        ("create b --parent none", 4, "there is no layer none", "`aufsctl create none`"),
        ("create a", 1, "layer a exists", "`aufsctl inspect a`"),
        ("get ../a", 1, "not a layer id", ""),
        ("create b --storage-opt size=1", 1, "no storage option size", ""),
        ("remove none", 4, "there is no layer none", "`aufsctl list`"),
    ],
)
def test_a_refusal_is_a_sentence_and_a_hint(
    command: Command, words: str, status: int, said: str, hint: str
) -> None:
    found, out, err = command(*words.split())
    assert (found, out) == (status, "")
    assert said in err
    assert ("hint: " in err) is bool(hint)
    assert hint in err
    assert "Traceback" not in err


def test_a_layer_in_use_is_busy(command: Command) -> None:
    command("get", "a")
    status, out, err = command("remove", "a")
    assert (status, out) == (5, "")
    assert "a is in use: 1 reference" in err
    assert command("remove", "a", "--force")[:2] == (0, "removed a\n")


@pytest.mark.parametrize(
    "words",
    [
        "nonsense",
        "get",
        "get a --wrong",
        "convert a --to zfs",
        "convert a",
        "list --limit 0",
        "create b --storage-opt novalue",
        "--timeout 0 ping",
        "--timeout inf ping",
        "--timeout nan ping",
        "--timeout 1e400 ping",
        "--timeout 3000000 ping",
        "top --interval inf",
        "top --interval nan",
        "",
    ],
)
def test_wrong_usage_exits_2(command: Command, words: str) -> None:
    status, out, err = command(*words.split())
    assert (status, out) == (2, "")
    assert "Usage: aufsctl" in err


def test_without_a_daemon_it_says_what_to_do(tmp_path: Path, capfd: Capture) -> None:
    status, out, err = Command(str(tmp_path / "none"), capfd)("ping")
    assert (status, out) == (3, "")
    assert "systemctl start aufsd" in err


def test_a_daemon_that_does_not_answer_cannot_be_reached(command: Command) -> None:
    status, _, err = command("--timeout", "0.05", "create", "slow2")
    assert status == 3
    assert "did not answer in time" in err


def test_a_full_daemon_is_busy(tmp_path: Path, capfd: Capture) -> None:
    with running(tmp_path, ServerSettings(max_connections=0)) as daemon:
        assert Command(daemon.path, capfd)("ping")[0] == 5


# --- streams ----------------------------------------------------------------------------------


def spawn(daemon: Daemon, *arguments: str, **streams: int) -> "subprocess.Popen[bytes]":
    """The command as a process of its own."""
    command = [sys.executable, "-m", "aufsd_client.cli", "--socket", daemon.path, *arguments]
    return subprocess.Popen(command, **streams)  # type: ignore[call-overload,no-any-return]


def test_diff_goes_to_standard_output_and_its_result_to_standard_error(
    daemon: Daemon, command: Command
) -> None:
    status, out, err = command("diff", "a")
    assert (status, out.encode(), err) == (0, TAR, "1 entry, 18 B")
    status, out, err = command("diff", "a", "--digest")
    assert "sha256:" in err
    with spawn(daemon, "--json", "diff", "a", stdout=-1, stderr=-1) as process:
        piped, said = process.communicate()
    assert piped == TAR
    assert json.loads(said)["size"] == len(TAR)


def test_diff_goes_to_a_file_and_its_result_to_standard_output(
    command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "a.tar"
    assert command("diff", "a", "-o", str(path)) == (0, "1 entry, 18 B\n", "")
    assert path.read_bytes() == TAR
    assert command("diff", "none", "-o", str(tmp_path / "none"))[0] == 4
    assert not (tmp_path / "none").exists()


def test_a_tar_is_not_for_a_terminal(daemon: Daemon) -> None:
    ours, theirs = os.openpty()
    with spawn(daemon, "diff", "a", stdout=theirs, stderr=-1) as process:
        _, err = process.communicate()
    assert process.returncode == 2
    assert b"not for a terminal" in err
    with spawn(daemon, "apply", "a", stdin=theirs, stderr=-1) as process:
        _, err = process.communicate()
    assert process.returncode == 2
    assert b"redirect one" in err
    os.close(ours)
    os.close(theirs)
    assert daemon.driver.calls == []


def test_apply_reads_standard_input_or_a_file(
    daemon: Daemon, command: Command, tmp_path: Path
) -> None:
    with spawn(daemon, "apply", "a", stdin=-1, stdout=-1) as process:
        out, _ = process.communicate(b"piped")
    assert (process.returncode, out) == (0, b"1 entry, 5 B\n")
    assert daemon.driver.applied == {"a": b"piped"}
    path = tmp_path / "a.tar"
    path.write_bytes(b"from a file")
    assert command("apply-diff", "a", "-i", str(path))[0] == 0
    assert daemon.driver.applied == {"a": b"from a file"}
    assert command("apply", "a", "-i", str(tmp_path / "none"))[0] == 1


def test_what_cannot_carry_a_tar_is_refused_with_a_hint(daemon: Daemon, command: Command) -> None:
    with spawn(daemon, "diff", "a", stdout=subprocess.DEVNULL, stderr=-1) as process:
        _, err = process.communicate()
    assert process.returncode == 1
    assert b"... | cat" in err


def test_an_interrupted_diff_is_cancelled_in_the_daemon(daemon: Daemon, command: Command) -> None:
    with spawn(daemon, "diff", "slow", stdout=-1) as process:
        daemon.until_running(1)
        process.kill()
    daemon.until_running(0)
    assert "diff slow cancelled" in daemon.driver.calls


def test_a_reader_that_has_seen_enough_is_no_error(daemon: Daemon) -> None:
    daemon.driver.parents |= {f"layer{n:05}": None for n in range(5000)}
    with spawn(daemon, "list", stdout=-1, stderr=-1) as process:
        assert process.stdout
        process.stdout.read(100)
        process.stdout.close()
        assert process.stderr
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE


# --- what a person sees -----------------------------------------------------------------------


def test_nothing_is_cut_where_the_output_is_no_terminal(daemon: Daemon, command: Command) -> None:
    long = "l" * 200
    daemon.driver.parents[long] = None
    _, out, _ = command("list")
    [row] = [line for line in out.splitlines() if line.startswith("lll")]
    assert row.split()[0] == long


def test_all_pages_are_listed(daemon: Daemon, command: Command) -> None:
    daemon.driver.parents |= {f"layer{n:05}": None for n in range(2500)}
    assert command("list")[1].count("\n") == 2504
    _, out, err = command("list", "--limit", "2", "--after", "layer00001")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["layer00002", "layer00003"]
    assert "--after layer00003" in err


def test_an_empty_store_says_so(daemon: Daemon, capfd: Capture) -> None:
    assert Command(daemon.path, capfd)("list") == (0, "there are no layers\n", "")


def test_a_path_cannot_write_on_the_terminal() -> None:
    assert show.text("/a\x1b[2J\n\udcff") == "/a\\x1b[2J\\n\\udcff"
    assert show.text("/ü 漢") == "/ü 漢"


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_234_567, "1.2 MB"),
        (999_960, "1.0 MB"),
        (5 * 10**12, "5.0 TB"),
        (10**19, "10000 PB"),
    ],
)
def test_sizes_are_said_as_a_person_says_them(count: int, said: str) -> None:
    assert show.size(count) == said


def test_numbers_agree_with_their_nouns() -> None:
    assert [show.plural(n, "entry") for n in (0, 1, 2)] == ["0 entries", "1 entry", "2 entries"]
    assert show.plural(2, "reference") == "2 references"


@pytest.mark.parametrize(
    ("error", "hint", "status"),
    [
        (errors.LayerHasChildren("m", id="a", children=["b", "c"]), "first: b c", 1),
        (
            errors.UnmountBusy("m", id="a", holders=[{"pid": 7, "comm": "sh"}]),
            "`aufsctl put a` again; held by sh (7)",
            5,
        ),
        (errors.LayerInUse("m", id="a"), "`aufsctl put a` drops one", 5),
        (errors.LayerInUse("m", holders=[{"pid": 7, "comm": "sh"}]), "held by sh (7)", 5),
        (errors.ConversionNeeded("m", command="aufsctl convert x --to aufs"), "run `aufsctl", 1),
        (errors.BadArchive("m", offset=512, entry="x"), "at byte 512, entry x", 1),
        (errors.BadArchive("m", offset=512), "at byte 512", 1),
        (errors.InternalError("m", incident="abc"), "incident abc", 1),
        (errors.AufsdError("m", any="thing"), "", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_hints_are_made_from_the_errors_data(error: Exception, hint: str, status: int) -> None:
    said, found, code = describe(error)
    assert said == "m"
    assert hint in found
    assert bool(hint) is bool(found)
    assert code == status


@pytest.mark.root
def test_who_may_not_open_the_control_socket_reads_the_monitor_one(
    daemon: Daemon, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "DEFAULT_SOCKET", daemon.path)
    monkeypatch.setattr(session, "MONITOR_SOCKET", str(daemon.served.monitor))
    let_in(Path(daemon.path))
    os.chmod(daemon.path, 0o600)
    results: list[int] = []

    def as_another_user() -> None:
        # of this thread alone, as the kernel has it (setresuid(2) without libc's spreading it)
        import ctypes

        libc = ctypes.CDLL(None)
        libc.syscall(117, 12345, 12345, 12345)
        results.extend([run(["status"]), run(["list"])])

    thread = threading.Thread(target=as_another_user)
    thread.start()
    thread.join()
    assert results == [0, 3]
    assert "join the group aufsd" in capfd.readouterr().err


def test_a_short_call_imports_only_what_it_uses(daemon: Daemon) -> None:
    """What is named here takes as long as all the rest of a `ping`."""
    script = (
        "import sys; from aufsd_client.cli.__main__ import run\n"
        f"assert run(['--socket', {daemon.path!r}, 'ping']) == 0\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "aufsd_client.link" in loaded
    heavy = {"rich", "aufsd_client.client", "aufsd_client.results", "aufsd_client.cli.layers"}
    assert loaded & heavy == set()


def test_json_is_heard_after_the_verb_too(command: Command) -> None:
    assert command("exists", "a", "--json") == command("--json", "exists", "a")
    assert json.loads(command("exists", "a", "--json")[1]) == {"exists": True}
