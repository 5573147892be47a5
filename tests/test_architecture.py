"""The rules of the house, read from the sources: who imports whom, what stays in one room."""

import ast
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
SOURCES = sorted([*CHECKOUT.glob("aufsd/**/*.py"), *CHECKOUT.glob("client/aufsd_client/**/*.py")])

# a room may import from rooms of its own level or below; the longest prefix that fits counts
LEVELS = {
    "aufsd.__main__": 9,
    "aufsd.daemon": 8,
    "aufsd.rpc": 7,
    "aufsd.root": 7,
    "aufsd.service": 6,
    "aufsd.driver": 5,
    "aufsd.status": 4,
    "aufsd.listing": 4,
    "aufsd.layers": 4,
    "aufsd.rescue": 4,
    "aufsd.active.mounts": 3,
    "aufsd.active.clearing": 3,
    "aufsd.active.opening": 3,
    "aufsd.active.remount": 3,
    "aufsd.archive": 3,
    "aufsd.active": 2,
    "aufsd.union": 2,
    "aufsd.store": 1,
    "aufsd.kernel": 1,
    "aufsd.config": 1,
    "aufsd.tasks": 1,
    "aufsd.threads": 1,
    "aufsd.active.refs": 1,
    "aufsd.results": 0,
    "aufsd.digits": 0,
    "aufsd.store.ids": 0,
    "aufsd.store.idmap": 0,
    "aufsd.store.layout": 0,
    "aufsd": 0,
    "aufsd_client": 0,
}
# where an outside package may be imported
ROOMS = {
    "ctypes": ("aufsd.kernel.",),
    "jsonrpcserver": ("aufsd.rpc.dispatch",),
    "trio": (
        *("aufsd.__main__", "aufsd.daemon", "aufsd.driver"),
        *("aufsd.tasks", "aufsd.threads"),
        *(
            "aufsd.active.",
            "aufsd.layers.",
            "aufsd.archive.jobs",
            "aufsd.archive.process",
            "aufsd.rpc.",
            "aufsd.service.",
        ),
        "aufsd_client.trio",
    ),
    "click": ("aufsd_client.cli.",),
    "rich": ("aufsd_client.cli.",),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "client" else parts
    return ".".join(parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, `from package import module` as the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = {name_of(source) for source in SOURCES}
            yield from (name if name in modules else node.module for name in below)


def level(module: str) -> int:
    fitting = [room for room in LEVELS if f"{module}.".startswith(f"{room}.")]
    return LEVELS[max(fitting, key=len)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_downwards_and_stay_in_their_rooms(path: Path) -> None:
    module = name_of(path)
    for imported in imports(path):
        if imported.startswith("aufsd"):
            assert level(imported) <= level(module), f"{module} imports {imported}"
        rooms = ROOMS.get(imported.partition(".")[0])
        if rooms is not None:
            assert f"{module}.".startswith(rooms), f"{module} imports {imported}"


def test_the_client_stands_alone() -> None:
    for path in CHECKOUT.glob("client/aufsd_client/**/*.py"):
        assert not [name for name in imports(path) if name.startswith("aufsd.")], path


def test_rooms_have_names_and_hold_one_thing() -> None:
    for path in SOURCES:
        assert path.stem not in {"util", "utils", "helpers", "common", "misc"}
        lines = len(path.read_text().splitlines())
        assert lines <= 450, f"{path} has {lines} lines: does that room hold two things?"


def test_the_picture_of_the_rooms_is_drawn_from_the_imports_as_they_are() -> None:
    script = runpy.run_path(str(CHECKOUT / "docs/rooms.py"))
    assert not script["upwards"](CHECKOUT), "rooms import each other in a circle"
    drawn = (CHECKOUT / "docs/rooms.svg").read_text()
    assert drawn == script["picture"](CHECKOUT), "run `.venv/bin/python docs/rooms.py`"


def test_the_picture_does_not_depend_on_the_order_of_sets() -> None:
    code = (
        "import runpy; s = runpy.run_path('docs/rooms.py'); print(s['picture'](s['HERE'].parent))"
    )
    pictures = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=CHECKOUT,
            env={"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2", "3", "4")
    }
    assert len(pictures) == 1


def test_the_store_knows_nothing_of_unions() -> None:
    for path in CHECKOUT.glob("aufsd/store/*.py"):
        assert not [name for name in imports(path) if name.startswith("aufsd.union")], path


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_all_of_proc_is_read_in_threads_that_are_kept_for_that(path: Path) -> None:
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".run") and call.args:
            where, what = ast.unparse(call.func), ast.unparse(call.args[0])
            if what.startswith("kernel_holders."):
                assert where.endswith("scans.run"), f"{path}: {where}({what})"
