"""aufsctl with outputs and inputs that cannot be used: a sentence, a status, nothing is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aufsd_client import Client
from tests.daemon import Daemon

pytestmark = pytest.mark.service


@pytest.fixture(autouse=True)
def _layers(client: Client) -> None:
    client.create("base")
    client.create("top", parent="base")


def aufsctl(served: Daemon, command: str, *passed: int) -> tuple[int, str]:
    """Exit status and standard error of a shell's `aufsctl COMMAND`."""
    run = f"'{sys.executable}' -m aufsd_client.cli.__main__ --socket '{served.socket}'"
    done = subprocess.run(
        ["/bin/bash", "-c", f"{run} {command}"],
        pass_fds=passed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("flags", ["", "--json"])
@pytest.mark.parametrize("output", [">&-", ">/dev/full", "| closed"])
def test_a_reference_whose_path_could_not_be_printed_is_put_back(
    served: Daemon, client: Client, output: str, flags: str
) -> None:
    if output == "| closed":
        # a pipe that nobody reads any more, for sure
        read, write = os.pipe()
        os.close(read)
        status, said = aufsctl(served, f"{flags} get top >&{write}", write)
        os.close(write)
    else:
        status, said = aufsctl(served, f"{flags} get top {output}")
    assert status == 1
    assert said.startswith("aufsctl: the path could not be printed (")
    assert said.endswith("the reference is put back\n")
    assert client.mounts().mounts == []


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("list >&-", 1),
        ("list >/dev/full", 1),
        ("--json mounts >/dev/full", 1),
        ("diff top >&-", 1),
        ("apply base <&-", 1),
        ("export top --gzip -o /dev/null", 2),
        ("export top --architecture arm64 -o /dev/null", 2),
        ("export top --oci /dev/null/x -o /dev/null", 2),
    ],
)
def test_what_cannot_be_written_read_or_meant_is_a_sentence(
    served: Daemon, command: str, status: int
) -> None:
    found, said = aufsctl(served, command)
    assert found == status
    assert said


def test_an_older_file_stays_until_the_new_one_is_whole(served: Daemon, tmp_path: Path) -> None:
    backup = tmp_path / "backup.tar"
    backup.write_text("the last one")
    backup.chmod(0o640)
    assert aufsctl(served, f"diff nosuch -o {backup}")[0] == 4
    assert backup.read_text() == "the last one"
    assert aufsctl(served, f"diff top -o {backup}")[0] == 0
    assert backup.stat().st_size >= 1024
    assert backup.stat().st_mode & 0o777 == 0o640
    assert aufsctl(served, f"diff nosuch -o {tmp_path}/other")[0] == 4
    assert [path.name for path in tmp_path.glob("*.tar*")] == ["backup.tar"]
    assert not (tmp_path / "other").exists()


def test_health_says_by_its_exit_status_how_it_is(served: Daemon, client: Client) -> None:
    assert aufsctl(served, "health >/dev/null")[0] == 0
    # a layer whose parents file is gone bad is in quarantine from the next start on
    (served.root / "layers" / "top").write_text("no/id\n")
    served.kill()
    served.start()
    assert client.health().status == "degraded"
    assert aufsctl(served, "health >/dev/null")[0] == 1


def test_an_answer_that_is_yes_or_no_is_one(client: Client) -> None:
    assert client.exists("top")
    assert not client.exists("nosuch")
    assert not client.remove("nosuch")
    assert client.remove("top")
