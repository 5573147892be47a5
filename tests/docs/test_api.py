"""docs/api.md is what the daemon says of itself, and its examples are what the daemon answers."""

import json
import runpy
import subprocess
import sys

import pytest

from aufsd.rpc.methods import TABLE
from tests.docs.blocks import CHECKOUT

SCRIPT = CHECKOUT / "docs/api.py"


def shape(value: object) -> object:
    """The keys and types of a reply, with a list as its first element."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value[:1]]
    return type(value).__name__


def test_the_page_is_made_from_the_table_as_it_is() -> None:
    script = runpy.run_path(str(SCRIPT))
    assert (CHECKOUT / "docs/api.md").read_text() == script["page"](), "run `docs/api.py`"


def test_each_method_has_its_place_and_its_example() -> None:
    script = runpy.run_path(str(SCRIPT))
    lines = script["SOURCE"].read_text().splitlines()
    placed = [line[1:] for line in lines if line.startswith("@") and line != "@errors"]
    assert sorted(placed) == sorted(TABLE)
    assert {name for name, _ in script["STORY"]} == set(TABLE)


@pytest.mark.service
def test_the_examples_are_what_a_daemon_answers() -> None:
    """By their shape: numbers, times and paths differ from run to run."""
    done = subprocess.run(
        ["unshare", "-m", sys.executable, str(SCRIPT), "--record-here"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    recorded = (CHECKOUT / "docs/api.jsonl").read_text().splitlines()
    fresh = done.stdout.splitlines()
    assert fresh[::2] == recorded[::2], "run `docs/api.py --record` as root"
    for request, before, now in zip(fresh[::2], recorded[1::2], fresh[1::2], strict=True):
        assert "result" in json.loads(now), request + now
        # what rpc.discover says is held to the table by the page
        if "rpc.discover" not in request:
            assert shape(json.loads(before)) == shape(json.loads(now)), request
