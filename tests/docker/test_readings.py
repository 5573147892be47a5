"""Where aufs reads a store otherwise: found from the branches alone, and held against kernels."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from aufsd.__main__ import main
from aufsd.archive import readings
from aufsd.archive.requests import Branch
from aufsd.store.dialect import Dialect
from aufsd_client import Client
from tests.conformance.layers import Layers, open_layers, tree
from tests.docker.store import DIFFERENT, LAYERS, unpack


@dataclass(frozen=True)
class Case:
    """Layers, lowest first; of a name in them, `-` deletes it and `!` at its end is opaque."""

    layers: tuple[tuple[str, ...], ...]
    strict: set[str]
    aufs: set[str]
    differ: list[bytes]


CASES = {
    "opaque over opaque": Case(
        (("d/low",), ("d!", "d/mid"), ("d!", "d/top")),
        {"d/", "d/top"},
        {"d/", "d/top", "d/mid"},
        [b"d/mid"],
    ),
    "the lowest of three opaque ones": Case(
        (("d/1",), ("d!", "d/2"), ("d!", "d/3"), ("e",), ("d!", "d/4")),
        {"d/", "d/4", "e"},
        {"d/", "d/2", "d/3", "d/4", "e"},
        [b"d/2", b"d/3"],
    ),
    "below an opaque directory": Case(
        (("d/s/low",), ("d!", "d/s/mid", "d/t/x"), ("d!", "d/s/top")),
        {"d/", "d/s/", "d/s/top"},
        {"d/", "d/s/", "d/s/top", "d/s/mid", "d/t/", "d/t/x"},
        [b"d/s/mid", b"d/t"],
    ),
    "a file between directories": Case(
        (("d/low",), ("d",), ("d/top",)),
        {"d/", "d/top"},
        {"d/", "d/top", "d/low"},
        [b"d/low"],
    ),
    "an opaque root": Case((("a",), ("!", "b")), {"b"}, {"a", "b"}, [b"a"]),
    "opaque over opaque with the same names": Case(
        (("d/x",), ("d!", "d/x"), ("d!", "d/x")), {"d/", "d/x"}, {"d/", "d/x"}, []
    ),
    "a whiteout between opaque ones": Case(
        (("d/low",), ("d!", "d/mid"), ("-d",), ("d!", "d/top")),
        {"d/", "d/top"},
        {"d/", "d/top"},
        [],
    ),
    "opaque once": Case(
        (("d/low", "e/x"), ("d!", "d/a"), ("d/b",)),
        {"d/", "d/a", "d/b", "e/", "e/x"},
        {"d/", "d/a", "d/b", "e/", "e/x"},
        [],
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(params=[pytest.param("aufs", marks=pytest.mark.aufs), "overlay"])
def layers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Layers]:
    """An empty store of each backend in turn."""
    with open_layers(request.param, f"{tmp_path}/store") as opened:
        yield opened


def build(layers: Layers, case: Case) -> list[str]:
    """The case's layers on disk; their ids, topmost first."""
    ids = []
    for names in case.layers:
        ids.append(layers.add())
        for name in names:
            if name.endswith("!"):
                layers.make_opaque(ids[-1], name[:-1])
            elif name.startswith("-"):
                layers.delete(ids[-1], name[1:])
            else:
                layers.write(ids[-1], name, "")
    return ids[::-1]


@pytest.mark.mounts
@each_case
def test_a_mounted_union_shows_the_reading_of_its_file_system(layers: Layers, case: Case) -> None:
    union = layers.mount(*build(layers, case), read_only=True)
    expected = case.aufs if layers.backend.name == "aufs" else case.strict
    assert set(tree(union.target)) == expected


@pytest.mark.mounts
@each_case
def test_what_the_two_readings_differ_in_is_named(layers: Layers, case: Case) -> None:
    assert named(layers, build(layers, case)) == case.differ


@pytest.mark.mounts
def test_of_a_name_beside_its_whiteout_aufs_sees_the_whiteout(tmp_path: Path) -> None:
    with open_layers("overlay", str(tmp_path)) as layers:
        base = layers.add({"other": ""})
        for name in ("d/x", "f", ".wh.d", ".wh.f", ".wh.gone"):
            layers.write(base, name, "")
        assert named(layers, [base], "aufs") == [b"d", b"f"]


def named(layers: Layers, ids: list[str], dialect: str = "") -> list[bytes]:
    chain = [Branch(id, Dialect(dialect or layers.backend.dialect)) for id in ids]
    store = os.open(layers.layout.diff, os.O_RDONLY | os.O_DIRECTORY)
    try:
        before = os.listdir("/proc/self/fd")
        ways = readings.differences(*readings.roots(store, chain, layers.backend.namespace))
        found = [way.path() for way in ways]
        assert os.listdir("/proc/self/fd") == before
    finally:
        os.close(store)
    return found


@pytest.mark.service
@pytest.mark.mounts
def test_check_names_the_layers_of_dockers_store_that_aufs_reads_otherwise(client: Client) -> None:
    found = client.check(deep=True).problems
    assert {problem.id for problem in found} == set(DIFFERENT)
    assert {problem.problem for problem in found} == {"aufs-reads-differently"}
    for problem in found:
        assert all(f"/{path}" in problem.detail for path in DIFFERENT[problem.id])
        assert not problem.repaired
    assert client.check().problems == []


@pytest.mark.service
@pytest.mark.mounts
@pytest.mark.parametrize("id", DIFFERENT, ids=str)
def test_check_of_one_layer_says_the_same(client: Client, id: str) -> None:
    assert [problem.id for problem in client.check(id, deep=True).problems] == [id]


@pytest.mark.root
def test_check_says_it_of_a_store_that_nobody_serves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = str(unpack(tmp_path))
    assert main(["check", "--root", root, "--adopt", "--deep"]) == 1
    *found, last = capfd.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in found] == sorted(DIFFERENT)
    assert {line.split(": ")[1] for line in found} == {"aufs-reads-differently"}
    assert last == f"{len(LAYERS)} layers, {len(DIFFERENT)} problems"
    assert main(["check", "--root", root]) == 0
