"""`tree`, `df`, `prune`, ids by their beginning, several ids, completion: against a real daemon."""

import json
import os
import pty
import subprocess
import sys

import pytest

from aufsd_client import Client
from tests.archives import tar
from tests.daemon import Daemon

pytestmark = pytest.mark.service

DIGEST = "0123456789ab" + "c" * 52
SIZE = 1_000_000


def aufsctl(
    served: Daemon, *arguments: str, stdin: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aufsd_client.cli.__main__", "--socket", str(served.socket)]
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, **environment},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def on_a_terminal(served: Daemon, *arguments: str, says: bytes = b"") -> tuple[int, str]:
    """Exit status, and all that the terminal shows."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "aufsd_client.cli.__main__", "--socket", str(served.socket)]
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}
    with subprocess.Popen(
        [*command, *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment
    ) as process:
        os.close(slave)
        os.write(master, says)
        shown = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # EIO: nobody has the other end any more
                break
            shown += piece
    os.close(master)
    return process.returncode, shown.decode()


@pytest.fixture(autouse=True)
def _layers(client: Client) -> None:
    client.create(DIGEST)
    client.apply_diff(DIGEST, _file())
    client.create("work", parent=DIGEST)
    client.create("used", parent="work")
    client.create("idle", parent="work")
    client.get("used")


def _file() -> bytes:
    return tar({"file": b"x" * SIZE})


def test_the_tree_has_sizes_and_who_is_in_use(served: Daemon) -> None:
    lines = aufsctl(served, "tree").stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [[DIGEST, "1.0"], ["│", "work"]]
    assert lines[3].startswith("├─ idle ")
    assert lines[4].startswith("└─ used ")
    assert "mounted" in lines[4]
    part = json.loads(aufsctl(served, "--json", "tree", "work").stdout)["layers"]
    assert [each["id"] for each in part] == ["work", "idle", "used"]
    assert part[2]["references"] == 1
    assert "size" in part[0]
    assert "size" not in json.loads(aufsctl(served, "--json", "tree", "--no-size").stdout)["layers"]


def test_a_tree_of_no_layer_is_not_found(served: Daemon) -> None:
    done = aufsctl(served, "tree", "none")
    assert done.returncode == 4
    assert "there is no layer none" in done.stderr


def test_the_tree_is_plain_where_the_output_is_not_unicode(served: Daemon) -> None:
    done = aufsctl(served, "tree", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "|- idle" in done.stdout


def test_df_says_what_a_removal_gives_back(served: Daemon, client: Client) -> None:
    found = json.loads(aufsctl(served, "--json", "df").stdout)
    spaces = {each["id"]: each for each in found["layers"]}
    assert spaces[DIGEST]["own"] >= SIZE
    assert spaces[DIGEST]["frees"] == spaces["work"]["frees"] == 0
    assert spaces["idle"]["chain"] >= SIZE
    assert spaces["idle"]["frees"] < SIZE
    assert found["size"] == sum(each["own"] for each in found["layers"])
    client.put("used")
    client.remove("used")
    alone = json.loads(aufsctl(served, "--json", "df").stdout)["layers"]
    assert next(each for each in alone if each["id"] == "idle")["frees"] >= SIZE
    assert aufsctl(served, "df").stdout.splitlines()[-1].startswith("3 layers, 1.0 MB, ")


def test_prune_removes_leaves_that_nobody_uses(served: Daemon, client: Client) -> None:
    looked = aufsctl(served, "prune", "--dry-run")
    assert looked.returncode == 0
    assert looked.stdout.splitlines()[1].startswith("idle ")
    assert client.exists("idle")
    done = aufsctl(served, "prune", "--yes", "--parents")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("removed 1 layer, ")
    assert [row.id for row in client.iter_layers()] == [DIGEST, "used", "work"]
    client.put("used")
    named = json.loads(aufsctl(served, "--json", "prune", "-y", "--parents").stdout)
    assert named["removed"] == ["used", "work", DIGEST]
    assert not list(client.iter_layers())
    assert aufsctl(served, "prune", "-y").stdout == "there is nothing to remove\n"


def test_prune_asks_and_takes_no_for_an_answer(served: Daemon, client: Client) -> None:
    status, shown = on_a_terminal(served, "prune", says=b"n\n")
    assert status == 0
    assert "Remove them? [y/N]" in shown
    assert client.exists("idle")
    status, shown = on_a_terminal(served, "prune", says=b"y\n")
    assert status == 0
    assert not client.exists("idle")


def test_prune_without_somebody_to_ask_removes_nothing(served: Daemon, client: Client) -> None:
    done = aufsctl(served, "prune", stdin="y\n")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr
    assert client.exists("idle")


@pytest.mark.parametrize("age", ["1", "h", "-1h", "1 h", "\u0661h", "1y", "nan", ""])
def test_an_age_that_is_none_is_a_usage_error(served: Daemon, client: Client, age: str) -> None:
    done = aufsctl(served, "prune", "-y", "--older-than", age)
    assert done.returncode == 2
    assert client.exists("idle")


def test_young_and_sealed_layers_stay(served: Daemon, client: Client) -> None:
    assert "nothing to remove" in aufsctl(served, "prune", "-y", "--older-than", "1h").stdout
    client.seal("idle")
    assert "nothing to remove" in aufsctl(served, "prune", "-y").stdout
    assert aufsctl(served, "prune", "-y", "--sealed", "--prefix", "id").returncode == 0
    assert not client.exists("idle")


def test_a_made_up_id_is_known_by_its_beginning(served: Daemon, client: Client) -> None:
    assert aufsctl(served, "usage", "0123456789ab").returncode == 0
    assert aufsctl(served, "create", "more", "--parent", "0123").returncode == 0
    assert client.get_metadata("more").metadata["parents"] == DIGEST
    # a yes or no for scripts is of the very id
    assert aufsctl(served, "exists", "0123456789ab").returncode == 4


def test_the_beginning_of_several_is_refused_and_a_whole_id_never_is(
    served: Daemon, client: Client
) -> None:
    other = DIGEST[:-1] + "d"
    client.create(other)
    done = aufsctl(served, "remove", DIGEST[:12])
    assert done.returncode == 2
    assert DIGEST in done.stderr
    assert other in done.stderr
    client.create(DIGEST[:12])
    assert aufsctl(served, "remove", DIGEST[:12]).returncode == 0
    assert client.exists(other)


def test_an_id_that_a_person_chose_has_to_be_whole(served: Daemon, client: Client) -> None:
    client.create("cafe-1")
    assert aufsctl(served, "remove", "cafe").returncode == 4
    assert aufsctl(served, "remove", "idl").returncode == 4
    assert client.exists("idle")


def test_several_ids_are_done_one_by_one_and_each_failure_is_told(
    served: Daemon, client: Client
) -> None:
    done = aufsctl(served, "remove", "none", "work", "idle", "used")
    assert done.returncode == 4
    assert done.stdout == "removed idle\n"
    assert "no layer none" in done.stderr
    assert "work" in done.stderr
    assert "used is in use" in done.stderr
    assert not client.exists("idle")


def test_several_answers_in_json_say_which_layer_they_are_of(served: Daemon) -> None:
    done = aufsctl(served, "--json", "get", "work", "none", "idle")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["id"] for each in found] == ["work", "idle"]
    assert all(each["path"] for each in found)
    assert done.returncode == 4
    one = json.loads(aufsctl(served, "--json", "put", "idle").stdout)
    assert "id" not in one


def test_a_terminal_sees_short_ids_and_a_pipe_whole_ones(served: Daemon) -> None:
    for verb in ("tree", "list", "df"):
        _, shown = on_a_terminal(served, verb)
        assert DIGEST[:12] in shown
        assert DIGEST not in shown
        assert DIGEST in aufsctl(served, verb).stdout


def _completed(served: Daemon, line: str) -> list[str]:
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    completing = {"_AUFSCTL_COMPLETE": "bash_complete", "AUFSD_SOCKET": str(served.socket)}
    done = aufsctl(served, **words, **completing)
    assert done.stderr == ""
    return [each.partition(",")[2] for each in done.stdout.splitlines() if each]


def test_a_shell_completes_verbs_options_and_ids(served: Daemon) -> None:
    assert _completed(served, "aufsctl che") == ["check", "checkpoint"]
    assert _completed(served, "aufsctl get i") == ["idle"]
    assert _completed(served, "aufsctl remove idle u") == ["used"]
    assert _completed(served, "aufsctl create new --parent w") == ["work"]
    assert "--force" in _completed(served, "aufsctl remove --f")


def test_completion_without_a_daemon_says_nothing(served: Daemon) -> None:
    served.stop()
    assert _completed(served, "aufsctl get i") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_each_shell_is_printed(served: Daemon, shell: str) -> None:
    done = aufsctl(served, "completion", shell)
    assert done.returncode == 0
    assert "_AUFSCTL_COMPLETE" in done.stdout


def test_bash_itself_takes_the_completion(served: Daemon) -> None:
    script = aufsctl(served, "completion", "bash").stdout
    done = subprocess.run(
        ["bash", "-ec", f"{script}\ncomplete -p aufsctl"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "-F _aufsctl_completion aufsctl" in done.stdout
