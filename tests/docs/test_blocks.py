"""Every block of the documentation is run, or says why not, and then its syntax is right."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import msgspec
import pytest

from aufsd import config
from aufsd.__main__ import command_line
from aufsd_client import Client
from aufsd_client.errors import LayerExists
from tests.daemon import Daemon, eventually
from tests.docs.blocks import CHECKOUT, Block, block_with, blocks, shell_blocks

# the first line of each block that a test below runs
TOUR = (
    "aufsd probe --root /var/lib/aufsd",
    "aufsctl create base",
    "root=$(aufsctl get work)",
    "from aufsd_client import Client",
    'echo \'{"jsonrpc": "2.0", "id": 1, "method": "health"}\'',
)
JOURNAL = "journalctl -u aufsd -p warning"
MONITORING = "check_aufsd  "
IMAGES = "layer=$(aufsctl load image.tar)"
SESSION = "$ top=$(aufsctl load image.tar)"
CHECKPOINTS = (
    "root=$(aufsctl get agent)",
    "import subprocess",
    "from pathlib",
    "aufsctl put coder",
)
RUN = (*TOUR, JOURNAL, MONITORING, IMAGES, SESSION, *CHECKPOINTS)


@pytest.mark.parametrize("block", shell_blocks(), ids=str)
def test_a_block_for_a_shell_is_run_or_says_why_not(block: Block) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=block.commands, text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    run = block.text.startswith(RUN)
    assert run != bool(block.why), "run it in a test, or write <!-- not run: WHY --> before it"


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "toml"], ids=str)
def test_a_configuration_has_keys_that_there_are(block: Block) -> None:
    assert tomllib.loads(block.text).keys() <= config.HELP.keys()


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "python"], ids=str)
def test_python_is_python(block: Block) -> None:
    compile(block.text, str(block), "exec")
    assert block.text.startswith(RUN)


def test_the_manual_has_every_command_and_key(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(CHECKOUT / "docs/man/build.py"), str(tmp_path)], check=True)
    page = (tmp_path / "aufsd.8").read_text().replace("\\-", "-")
    commands = next(action for action in command_line()._actions if action.choices)
    assert commands.choices is not None
    for name in commands.choices:
        assert f"aufsd {name}" in page
    sample = (tmp_path / "aufsd.toml").read_text()
    for name in config.HELP:
        assert f"\n#{name} = " in sample
    # a list is shown as one would write it
    shown = re.findall(r"^# such as (.*)\n#(\w+) = ", sample, re.MULTILINE)
    assert len(shown) == 5
    for value, name in shown:
        assert msgspec.convert(tomllib.loads(f"{name} = {value}"), config.Config)


# --- run ------------------------------------------------------------------------------------------


def small_root(tar: Path, directory: Path) -> None:
    """A root file system with a shell, rm and what they are linked with."""
    for name in ("bin", "etc", "usr/share/doc"):
        (directory / name).mkdir(parents=True)
    (directory / "usr/share/doc/file").touch()
    with tarfile.open(tar, "w:gz") as archive:
        archive.add(directory, ".")
        libraries = set()
        for program in ("/bin/sh", "/bin/rm"):
            archive.add(os.path.realpath(program), f".{program}")
            linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
            libraries |= set(re.findall(r"(/\S+) \(0x", linked.stdout))
        for library in sorted(libraries):
            archive.add(os.path.realpath(library), f".{library}")


@pytest.mark.blocks
@pytest.mark.service
def test_the_tour_of_the_readme_is_what_happens(tmp_path: Path) -> None:
    """In a mount namespace in which /run and /var/lib are new; one shell from the first to last."""
    small_root(tmp_path / "debian.tar.gz", tmp_path / "root")
    steps = []
    for first in TOUR:
        block = block_with(first)
        if block.language == "python":
            steps.append(f"python <<'EOF'\n{block.text}EOF\n")
        else:
            steps.append(block.commands)
        if "aufsd serve" in block.text:
            steps.append("until aufsctl ping; do sleep 0.1; done 2>/dev/null")
    script = "\n".join(
        (
            "set -eo pipefail",
            "mount -t tmpfs none /run && mount -t tmpfs none /var/lib && mkdir /run/aufsd",
            "trap 'kill %1; wait %1' EXIT",
            *steps,
        )
    )
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # what the page says that it shows
    for said in ("A /etc/motd", "D /usr/share/doc", "/var/lib/aufsd/mnt/work2", '"status": "'):
        assert said in done.stdout
    assert (tmp_path / "work.tar").stat().st_size


@pytest.mark.blocks
@pytest.mark.service
def test_the_recipes_for_the_journal_pass_over_what_is_not_ours(
    served: Daemon, client: Client, tmp_path: Path
) -> None:
    client.create("web")
    with pytest.raises(LayerExists):
        client.create("web")
    # a line is written after the answer
    eventually(lambda: '"LayerExists"' in served.log)
    others = {
        "PermissionDenied": {"event": "call", "uid": 1000, "outcome": "PermissionDenied"},
        "0123456789abcdef": {"event": "call", "uid": 0, "incident": "0123456789abcdef"},
    }
    log = [
        "Starting aufsd.service - aufsd, layered root file systems...",
        *served.log.splitlines(),
        *map(json.dumps, others.values()),
        "7",
        "aufsd.service: Main process exited, code=killed, status=9/KILL",
    ]
    (tmp_path / "journal").write_text("\n".join(log) + "\n")
    journalctl = tmp_path / "journalctl"
    journalctl.write_text(f"#!/bin/sh\ncase $* in *'-o cat'*) cat {tmp_path}/journal ;; esac\n")
    journalctl.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    lines = block_with(JOURNAL).commands.splitlines()
    recipes = [line for line in lines if line.startswith("calls '")]
    functions = "\n".join(line for line in lines if line.startswith("calls()"))
    # those of the table of alerts as well
    page = (CHECKOUT / "docs/operations.md").read_text()
    recipes += [each.replace("\\|", "|") for each in re.findall(r"`(calls [^`]+)`", page)]
    assert len(recipes) >= 9
    told = {}
    for recipe in recipes:
        done = subprocess.run(
            ["bash", "-ec", f"set -o pipefail\n{functions}\n{recipe}"],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), recipe
        told[recipe.partition("  #")[0].rstrip()] = done.stdout.splitlines()
    assert len(told["calls '.event == \"call\"'"]) == 4
    assert len(told['calls \'.layer == "web" and .event == "call"\'']) == 2
    for name in others:
        (found,) = [
            lines for recipe, lines in told.items() if name in recipe and "!=" not in recipe
        ]
        assert len(found) == 1


@pytest.mark.service
def test_the_checks_of_monitoring_are_what_the_page_says(served: Daemon, tmp_path: Path) -> None:
    plugin = tmp_path / "check_aufsd"
    source = CHECKOUT / "systemd/monitoring/check_aufsd.py"
    plugin.write_text(
        f"#!/bin/sh\nexec '{sys.executable}' '{source}' -s '{served.socket}' \"$@\"\n"
    )
    plugin.chmod(0o755)
    for line in block_with(MONITORING).commands.splitlines():
        done = subprocess.run(
            ["bash", "-c", line],
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 1, 2), done.stderr
        assert done.stdout.startswith("AUFSD ")


@pytest.mark.service
def test_the_recipe_for_images(served: Daemon, tmp_path: Path) -> None:
    small_root(tmp_path / "image.tar", tmp_path / "root")
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "AUFSD_SOCKET": served.socket,
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    command = ["bash", "-ec", block_with(IMAGES).commands]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sha256-" in done.stdout


@pytest.mark.service
def test_the_recipe_for_checkpoints(served: Daemon, client: Client) -> None:
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "AUFSD_SOCKET": served.socket,
        "PATH": f"{programs}:{os.environ['PATH']}",
    }

    def run(first: str) -> str:
        block = block_with(first)
        command = ["bash", "-ec", block.commands]
        if block.language == "python":
            text = block.text.replace("Client()", f"Client({served.socket!r})")
            command = [sys.executable, "-c", text]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, cwd="/"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    client.create("base")
    for id in ("agent", "coder", "search"):
        client.create(id, parent="base")
    by_hand, loop, tree, long = CHECKPOINTS
    said = run(by_hand)
    assert "A /notes" in said
    assert "a good idea" in said
    assert [row.id for row in client.log("agent")] == [
        *("agent", "agent.2", "agent.good", "agent.1", "base"),
    ]
    said = run(loop)
    assert "undone: rm result; false" in said
    assert said.count("kept: ") == 2
    with client.mounted("coder") as path:
        assert Path(path, "result").read_text() == "one\ntwo\n"
    assert run(tree) == "found abba\n"
    client.get("coder")
    run(long)
    assert [row.id for row in client.log("coder")] == ["coder", "base"]
