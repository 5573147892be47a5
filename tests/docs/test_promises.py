"""Each promise of the page on reliability names tests, and they are there."""

import ast
import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PAGE = (CHECKOUT / "docs/reliability.md").read_text()
# a code span that names a test file, a test in one, or a test alone
NAMED = sorted(
    {
        re.sub(r"\s", "", span)
        for span in re.findall(r"`([^`]+)`", PAGE)
        if re.fullmatch(r"\s*((tests/)?[\w/]*test_\w+\.py(::\w+)?|test_\w+)\s*", span)
    }
)
PROMISES = [part for part in PAGE.split("\n\n") if part.startswith("**")]


def functions(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


TESTS = {path: functions(path) for path in CHECKOUT.glob("tests/**/test_*.py")}


@pytest.mark.parametrize("name", NAMED)
def test_a_test_that_is_named_is_there(name: str) -> None:
    file, _, function = name.partition("::")
    if not file.endswith(".py"):
        file, function = "", file
    fits = [path for path in TESTS if not file or f"/{path}".endswith(f"/{file}")]
    assert any(not function or function in TESTS[path] for path in fits)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.split("**")[1][:60])
def test_a_promise_names_its_test(promise: str) -> None:
    assert re.search(r"`(tests/\S*|test_\w+\S*)`", promise)
