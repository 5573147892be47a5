"""The examples of JSON-RPC 2.0, section 7, with methods of ours and parameters by name."""

import json
from typing import Any

import pytest

from tests.rpc.raw_peer import code, line, notification
from tests.rpc.serving import Connect, Served


def failure(number: int, id: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "error": number, "id": id}


def success(result: object, id: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "result": result, "id": id}


def without_texts(answer: Any) -> Any:
    """The answer with each error object as its code alone."""
    if isinstance(answer, list):
        return [without_texts(each) for each in answer]
    return {**answer, "error": code(answer)} if "error" in answer else answer


EXAMPLES: dict[str, tuple[bytes, object]] = {
    "named parameters": (
        b'{"jsonrpc": "2.0", "method": "exists", "params": {"id": "base"}, "id": 3}',
        success({"exists": False}, 3),
    ),
    "their order does not matter": (
        b'{"jsonrpc": "2.0", "method": "remove", "params": {"force": true, "id": "x"}, "id": 4}',
        success({"removed": False, "reason": "not-found"}, 4),
    ),
    "a method that does not exist": (
        b'{"jsonrpc": "2.0", "method": "foobar", "id": "1"}',
        failure(-32601, "1"),
    ),
    "invalid JSON": (
        b'{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]',
        failure(-32700, None),
    ),
    "an invalid request object": (
        b'{"jsonrpc": "2.0", "method": 1, "params": "bar"}',
        failure(-32600, None),
    ),
    "a batch, invalid JSON": (
        b'[ {"jsonrpc": "2.0", "method": "ping", "id": "1"}, {"jsonrpc": "2.0", "method" ]',
        failure(-32700, None),
    ),
    "an empty array": (b"[]", failure(-32600, None)),
    "an invalid batch, not empty": (b"[1]", [failure(-32600, None)]),
    "an invalid batch": (b"[1,2,3]", [failure(-32600, None)] * 3),
    "a batch": (
        b"["
        b'{"jsonrpc": "2.0", "method": "exists", "params": {"id": "base"}, "id": "1"},'
        b'{"jsonrpc": "2.0", "method": "put", "params": {"id": "hello"}},'
        b'{"jsonrpc": "2.0", "method": "put", "params": {"id": "base"}, "id": "2"},'
        b'{"foo": "boo"},'
        b'{"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},'
        b'{"jsonrpc": "2.0", "method": "ping", "id": "9"}'
        b"]",
        [
            success({"exists": False}, "1"),
            success({"references": 0, "mounted": False, "dropped": True}, "2"),
            failure(-32600, None),
            failure(-32601, "5"),
            success({}, "9"),
        ],
    ),
}


@pytest.mark.parametrize("example", EXAMPLES)
async def test_the_examples_give_the_answers_printed_there(
    served: Served, connect: Connect, example: str
) -> None:
    request, wanted = EXAMPLES[example]
    peer = connect(served.control)
    await peer.send(request + b"\n")
    assert without_texts(await peer.receive()) == wanted


@pytest.mark.parametrize(
    "silent",
    [
        notification("create", id="made"),
        notification("foobar"),
        notification("get", id=7),
        b'[{"jsonrpc": "2.0", "method": "put", "params": {"id": "made"}},'
        b'{"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}]\n',
    ],
    ids=["a call", "no such method", "wrong parameters", "a batch"],
)
async def test_notifications_are_not_answered(
    served: Served, connect: Connect, silent: bytes
) -> None:
    peer = connect(served.control)
    await peer.send(silent)
    await peer.send(line("version", "after"))
    assert (await peer.receive())["id"] == "after"
    await peer.settle()
    assert not peer.has_answer()


async def test_notifications_are_carried_out(served: Served, connect: Connect) -> None:
    peer = connect(served.control)
    await peer.send(notification("create", id="one"))
    await peer.send(b"[" + notification("create", id="two").strip() + b"]\n")
    await peer.settle()
    assert served.driver.parents == {"one": None, "two": None}


async def test_the_calls_of_a_batch_run_in_order(served: Served, connect: Connect) -> None:
    peer = connect(served.control)
    calls = [("create", "a"), ("get", "a"), ("put", "a"), ("remove", "a"), ("create", "a")]
    batch = [json.loads(line(method, n, id=id)) for n, (method, id) in enumerate(calls)]
    await peer.send(json.dumps(batch).encode() + b"\n")
    answers = await peer.receive()
    assert [answer["id"] for answer in answers] == list(range(5))
    assert served.driver.calls[::2] == [f"{method} {id}" for method, id in calls]
    assert all("result" in answer for answer in answers)


@pytest.mark.parametrize(
    "id", ["text", "", "ü\n", 0, -1, 2.5, 12345678901234567890123, None], ids=repr
)
async def test_the_id_comes_back_as_it_was(served: Served, connect: Connect, id: object) -> None:
    peer = connect(served.control)
    await peer.send(line("ping", id))
    assert await peer.receive() == success({}, id)


@pytest.mark.parametrize(
    ("method", "params"), [("ping", ["base"]), ("exists", ["base"]), ("exists", []), ("get", [1])]
)
async def test_parameters_by_position_are_invalid(
    served: Served, connect: Connect, method: str, params: list[str]
) -> None:
    peer = connect(served.control)
    call = {"jsonrpc": "2.0", "method": method, "params": params, "id": 1}
    await peer.send(json.dumps(call).encode() + b"\n")
    assert code(await peer.receive()) == -32602


async def test_a_batch_that_has_no_room_for_its_calls_is_one_invalid_request(
    served: Served, connect: Connect
) -> None:
    peer = connect(served.control)
    await peer.send(b"[" + b"1," * 30_000 + b"1]\n")
    assert without_texts(await peer.receive()) == failure(-32600, None)
    await peer.settle()


@pytest.mark.parametrize("params", [{}, [], None], ids=repr)
@pytest.mark.parametrize("method", ["ping", "mounts", "list", "cleanup"])
async def test_no_parameters_may_be_said_in_any_way(
    served: Served, connect: Connect, method: str, params: object
) -> None:
    """Go's encoder marshals nil as null, and many libraries send an empty array."""
    peer = connect(served.control)
    call = {"jsonrpc": "2.0", "method": method, "params": params, "id": 1}
    await peer.send(json.dumps(call).encode() + b"\n")
    assert "result" in await peer.receive()


REFUSED: dict[str, tuple[bytes, int]] = {
    "another member": (b'{"jsonrpc":"2.0","method":"ping","trace":"x","id":8}', -32600),
    "no version": (b'{"method":"ping","params":[],"id":8}', -32600),
    "no method": (b'{"jsonrpc":"2.0","id":8}', -32600),
    "params are a text": (b'{"jsonrpc":"2.0","method":"ping","params":"x","id":8}', -32600),
    "by position": (b'{"jsonrpc":"2.0","method":"get","params":["x"],"id":8}', -32602),
    "unknown": (b'{"jsonrpc":"2.0","method":"get","params":{"id":"a","x":1},"id":8}', -32602),
}


@pytest.mark.parametrize("kind", REFUSED)
async def test_a_request_that_is_refused_is_answered_with_its_id(
    served: Served, connect: Connect, kind: str
) -> None:
    """A client that looks for the call by the id of the answer waits for ever on a null."""
    request, wanted = REFUSED[kind]
    peer = connect(served.control)
    await peer.send(request + b"\n[" + request + b"]\n")
    answers = [await peer.receive(), *await peer.receive()]
    assert [without_texts(answer) for answer in answers] == [failure(wanted, 8)] * 2


@pytest.mark.parametrize("id", [[], {}, True], ids=repr)
async def test_an_id_that_no_answer_may_carry_is_null_there(
    served: Served, connect: Connect, id: object
) -> None:
    peer = connect(served.control)
    await peer.send(line("ping", id))
    assert without_texts(await peer.receive()) == failure(-32600, None)


@pytest.mark.parametrize("number", ["5", "5.0", "50e-1"])
async def test_a_number_with_a_fraction_of_zero_is_an_integer(
    served: Served, connect: Connect, number: str
) -> None:
    served.driver.parents |= {f"layer{n}": None for n in range(9)}
    peer = connect(served.control)
    text = line("list", limit=12345)
    await peer.send(text.replace(b"12345", number.encode()))
    assert len((await peer.receive())["result"]["layers"]) == 5
    await peer.send(text.replace(b"12345", b"5.5"))
    assert code(await peer.receive()) == -32602
