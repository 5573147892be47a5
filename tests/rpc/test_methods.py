"""What every method checks before it calls the driver, and the line that every call leaves."""

import json
import os
from typing import Any

import pytest

from aufsd.rpc.methods import TABLE
from tests.rpc.raw_peer import code, line, name
from tests.rpc.serving import Connect, Served

BAD_IDS = [
    "",
    "a/b",
    "..",
    ".hidden",
    "-x",
    "a\nb",
    "a\n",
    "a\x00",
    "a b",
    "ü",
    "x" * 201,
    "x" * 300,
    "x-removing",
]
WITH_ID = [
    method
    for method, row in TABLE.items()
    if "id" in row.params.__struct_fields__ and method != "check"
]
WITH_PARENT = [row.name for row in TABLE.values() if "parent" in row.params.__struct_fields__]


def others(method: str) -> dict[str, object]:
    """What else a method has to be given."""
    if method == "convert":
        return {"to": "aufs"}
    if method == "checkpoint":
        return {"as": "b"}
    if method == "squash":
        return {"onto": "b"}
    return {"fd": 0} if TABLE[method].streams else {}


@pytest.mark.parametrize("method", WITH_ID)
async def test_what_is_no_id_is_refused_before_anything_is_touched(
    served: Served, connect: Connect, method: str
) -> None:
    peer = connect(served.control)
    for id in BAD_IDS:
        answer = await peer.ask(method, id=id, **others(method))
        assert (code(answer), name(answer)) == (-32602, "InvalidLayerId"), id
    assert served.driver.calls == []


@pytest.mark.parametrize("method", WITH_PARENT)
async def test_so_is_what_is_no_parent_but_the_empty_one(
    served: Served, connect: Connect, method: str
) -> None:
    served.driver.parents["a"] = None
    peer = connect(served.control)
    for parent in BAD_IDS[1:]:
        answer = await peer.ask(method, id="a", parent=parent, **others(method))
        assert name(answer) == "InvalidLayerId", parent
    assert served.driver.calls == []
    answer = await peer.ask(method, id="a", parent="", **others(method))
    assert "InvalidLayerId" not in json.dumps(answer)


async def test_check_takes_no_id_or_a_right_one(served: Served, connect: Connect) -> None:
    peer = connect(served.control)
    for id in BAD_IDS[1:]:
        assert name(await peer.ask("check", id=id)) == "InvalidLayerId"
    await peer.ask("check", id="")
    await peer.ask("check", id="a", deep=True, repair=True)
    assert served.driver.calls == ["check None False False", "check a True True"]


@pytest.mark.parametrize("id", ["a", "0", "A-b_c.d", "x" * 200, "a..", "a-removing-b"])
async def test_a_right_id_reaches_the_driver(served: Served, connect: Connect, id: str) -> None:
    await connect(served.control).ask("create", id=id)
    assert served.driver.parents == {id: None}


@pytest.mark.parametrize("method", ["create", "get"])
@pytest.mark.parametrize("label", ["x" * 256, "ü" * 128, 'a"b', "a'b", "a\\b", "a\nb", "a\x7fb"])
async def test_what_is_no_label_is_refused(
    served: Served, connect: Connect, method: str, label: str
) -> None:
    answer = await connect(served.control).ask(method, id="a", mount_label=label)
    assert (code(answer), name(answer)) == (-32602, "InvalidLabel")
    assert served.driver.calls == []


async def test_an_error_says_who_what_and_in_a_sentence(served: Served, connect: Connect) -> None:
    error = (await connect(served.control).ask("get", id="none"))["error"]
    assert error == {
        "code": 101,
        "message": "there is no layer none",
        "data": {"name": "LayerNotFound", "id": "none"},
    }


LINES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "a change": (
        line("create", id="new"),
        {"level": "info", "method": "create", "layer": "new", "outcome": "ok"},
    ),
    "a use": (
        line("put", id="a"),
        {"level": "info", "method": "put", "layer": "a", "outcome": "ok"},
    ),
    "a read": (line("exists", id="a"), {"level": "debug", "method": "exists", "outcome": "ok"}),
    "a poll": (line("version"), {"level": "debug", "method": "version", "layer": None}),
    "a refusal": (
        line("get", id="none"),
        {
            "level": "info",
            "method": "get",
            "outcome": "LayerNotFound",
            "reason": "there is no layer none",
        },
    ),
    "a read that fails": (
        line("holders", id="none"),
        {"level": "info", "method": "holders", "outcome": "LayerNotFound"},
    ),
    "no method": (
        line("nothing"),
        {"level": "debug", "method": None, "outcome": "MethodNotFound"},
    ),
    "garbage": (b"garbage\n", {"level": "debug", "method": None, "outcome": "ParseError"}),
}


@pytest.mark.parametrize("kind", LINES)
async def test_a_call_leaves_one_line(
    served: Served, connect: Connect, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    call, wanted = LINES[kind]
    peer = connect(served.control)
    await peer.send(call)
    await peer.receive()
    lines = [json.loads(text) for text in capfd.readouterr().err.splitlines()]
    [found] = [each for each in lines if each["event"] == "call"]
    assert wanted.items() <= found.items()
    assert (found["pid"], found["uid"]) == (os.getpid(), os.getuid())
    assert found["comm"]
    assert found["seconds"] >= 0
