"""A store moved to another union file system by aufsctl, as an operator does it, and back."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd_client import Client, errors
from aufsd_client.cli.__main__ import run
from tests.daemon import Daemon, daemon
from tests.docker import store
from tests.docker.store import LAYERS, ORDERED, View

pytestmark = [pytest.mark.service, pytest.mark.mounts]

LEAF = max(ORDERED, key=lambda id: len(LAYERS[id]["parents"]))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon on overlayfs that converts nothing by itself."""
    root = store.unpack(tmp_path)
    flags = ("--adopt", "--backend", "overlay", "--convert", "never")
    with daemon(tmp_path, *flags, root=root) as made:
        yield made


@pytest.fixture
def client(served: Daemon) -> Iterator[Client]:
    """A client of it."""
    with served.client() as made:
        yield made


def convert_all(served: Daemon, to: str) -> tuple[int, dict[str, object]]:
    command = ["--socket", served.socket, "--json", "convert", "--all", "--to", to]
    aufsctl = [sys.executable, "-m", "aufsd_client.cli.__main__"]
    done = subprocess.run([*aufsctl, *command], capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout)


def dialects(client: Client) -> set[str]:
    return {client.get_metadata(id).metadata["dialect"] for id in LAYERS}


def contents(served: Daemon) -> dict[str, View]:
    """All layers' own content, with marks as names alone."""
    found = {}
    for id in LAYERS:
        view = store.seen(str(served.root / "diff" / id))
        for path, record in view.items():
            if os.path.basename(path).startswith(".wh."):
                view[path] = {"path": path, "type": record["type"], "mode": record["mode"]}
        found[id] = view
    return found


def strip_housekeeping(root: Path) -> None:
    """Take away what aufs keeps at the top of a branch, which no conversion brings back."""
    for layer in (root / "diff").iterdir():
        for name in (".wh..wh.aufs", ".wh..wh.orph", ".wh..wh.plnk"):
            path = layer / name
            times = (layer.stat().st_atime_ns, layer.stat().st_mtime_ns)
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            os.utime(layer, ns=times)


def test_a_store_that_went_there_and_back_is_the_same(served: Daemon, client: Client) -> None:
    strip_housekeeping(served.root)
    before = contents(served)
    everything = sorted(LAYERS)
    assert convert_all(served, "overlay") == (0, result(converted=everything))
    assert dialects(client) == {"overlay"}
    assert not marks(served)
    assert convert_all(served, "overlay") == (0, result(unchanged=len(LAYERS)))
    assert convert_all(served, "aufs") == (0, result(converted=everything))
    assert dialects(client) == {"aufs"}
    assert contents(served) == before
    for path in served.root.glob("diff/**/*"):
        assert not [name for name in os.listxattr(path, follow_symlinks=False) if "aufsd" in name]


def result(
    *,
    converted: list[str] | None = None,
    unchanged: int = 0,
    in_use: list[str] | None = None,
    damaged: list[str] | None = None,
) -> dict[str, object]:
    return {
        "converted": converted or [],
        "unchanged": unchanged,
        "in_use": in_use or [],
        "damaged": damaged or [],
    }


def marks(served: Daemon) -> list[Path]:
    return list(served.root.glob("diff/**/.wh.*"))


def test_without_leave_to_convert_it_says_what_to_run(served: Daemon, client: Client) -> None:
    with pytest.raises(errors.ConversionNeeded) as refused:
        client.get(LEAF)
    command = str(refused.value.data["command"]).split()
    assert command[0] == "aufsctl"
    assert run(["--socket", served.socket, *command[1:]]) == 0
    assert convert_all(served, "overlay")[0] == 0
    with client.mounted(LEAF) as path:
        assert store.seen(path) == store.expected(LEAF, strict=True)


def test_what_is_in_use_is_passed_over_and_done_the_next_time(
    served: Daemon, client: Client
) -> None:
    for id in (LEAF, *LAYERS[LEAF]["parents"]):
        client.convert(id, "overlay")
    client.get(LEAF)
    in_use = sorted({LEAF, *LAYERS[LEAF]["parents"]})
    others = sorted(LAYERS.keys() - set(in_use))
    assert convert_all(served, "aufs") == (5, result(unchanged=len(others), in_use=in_use))
    client.put(LEAF)
    assert convert_all(served, "aufs") == (0, result(unchanged=len(others), converted=in_use))


def test_a_damaged_layer_is_named_and_the_rest_converted(served: Daemon, client: Client) -> None:
    """A device that overlayfs would take for a deleted file."""
    os.mknod(served.root / "diff" / LEAF / "node", 0o020600, os.makedev(0, 0))
    rest = sorted(LAYERS.keys() - {LEAF})
    assert convert_all(served, "overlay") == (1, result(converted=rest, damaged=[LEAF]))


def test_interrupted_it_goes_on_where_it_was(served: Daemon, client: Client) -> None:
    aufsctl = [sys.executable, "-u", "-m", "aufsd_client.cli.__main__", "--socket", served.socket]
    command = [*aufsctl, "convert", "--all", "--to", "overlay"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        first = child.stdout.readline()
        child.send_signal(signal.SIGINT)
        child.communicate()
    assert first == f"1/{len(LAYERS)} {min(LAYERS)}: converted\n"
    served.kill()
    served.start()
    status, found = convert_all(served, "overlay")
    assert status == 0
    assert min(LAYERS) not in found["converted"]  # type: ignore[operator]
    assert dialects(client) == {"overlay"}
