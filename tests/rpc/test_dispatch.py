"""Binding: what is a request, and what its parameters may be."""

import json
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonrpcserver.main import default_validator

from aufsd.driver import Driver
from aufsd.kernel.peer import Peer
from aufsd.rpc import dispatch
from aufsd.rpc.calls import Call, Kind, Method
from aufsd.rpc.dispatch import Methods, Request
from aufsd.rpc.methods import MAX_PAGE, TABLE
from aufsd_client.errors import InvalidParams, PermissionDenied
from tests.rpc.fake_driver import FakeDriver

METHODS = dispatch.register(TABLE)


def permit(kind: Kind) -> None:
    """Everybody may do everything."""


def gate(method: Method) -> None:
    """Every call is taken."""


def call() -> Call:
    return Call(cast(Driver, FakeDriver()), Peer(1, 2, 3), permit)


def send(request: object) -> Request:
    return dispatch.dispatch(request, METHODS, gate, call())


def request(method: str, **params: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "method": method, "params": params, "id": 1}


def accepts(value: object) -> bool:
    """Whether the library takes it for a request; null for no parameters is our own addition."""
    if isinstance(value, dict) and value.get("params", {}) is None:
        value = {**value, "params": {}}
    try:
        default_validator(value)
    except Exception:
        return False
    return True


VALUES: list[object] = [None, True, 0, 1.5, 10**30, "", "2.0", [], [1], {}, {"id": 1}]
BASE: dict[str, object] = {"jsonrpc": "2.0", "method": "ping", "params": {}, "id": 1}
CORPUS: list[object] = [
    *(value for value in VALUES if not isinstance(value, list)),
    *({**BASE, member: value} for member in (*BASE, "extra") for value in VALUES),
    *({k: v for k, v in BASE.items() if k != member} for member in BASE),
    {"jsonrpc": "2.0", "method": "ping"},
    {"jsonrpc": "2.0", "method": "ping", "extra": 1},
]


@pytest.mark.parametrize("value", CORPUS, ids=json.dumps)
def test_a_request_is_what_the_librarys_schema_says(value: object) -> None:
    """Batches are told apart before, so a list never comes here."""
    assert (dispatch.fault(value) == "") == accepts(value)


members = st.sampled_from([*BASE, "extra"])
values = st.sampled_from(VALUES)


@given(st.dictionaries(members, values))
def test_so_for_any_object(value: dict[str, object]) -> None:
    assert (dispatch.fault(value) == "") == accepts(value)


@pytest.mark.parametrize(
    ("method", "params", "text"),
    [
        ("get", {}, "get: the parameter `id` is missing"),
        ("get", {"id": "a", "lable": "x"}, "get: there is no parameter `lable`"),
        ("get", {"id": 1}, "get: the parameter `id` is not right: expected `str`, got `int`"),
        ("get", {"id": None}, "get: the parameter `id` is not right: expected `str`, got `null`"),
        ("get", {"id": "a", "hold": "no"}, "get: the parameter `hold` is not right: invalid"),
        ("remove", {"id": "a", "force": 1}, "remove: the parameter `force` is not right"),
        ("create", {"id": "a", "storage_opt": {"k": 1}}, "create: the parameter `storage_opt` is"),
        ("create", {"id": "a", "storage_opt": []}, "create: the parameter `storage_opt` is"),
        ("changes", {"id": "a", "limit": 0}, "changes: the parameter `limit` is not right"),
        ("changes", {"id": "a", "limit": "5"}, "changes: the parameter `limit` is not right"),
        ("list", {"limit": -1}, "list: the parameter `limit` is not right"),
        ("convert", {"id": "a", "to": "zfs"}, "convert: the parameter `to` is not right: invalid"),
        ("convert", {"id": "a"}, "convert: the parameter `to` is missing"),
        ("diff", {"id": "a", "fd": 1}, "diff: the parameter `fd` is not right"),
        ("ping", {"x": 1}, "ping: there is no parameter `x`"),
        ("ping", {"call": 1}, "ping: there is no parameter `call`"),
        ("ping", {"bound": 1}, "ping: there is no parameter `bound`"),
        ("ping", {"": 1}, "ping: there is no parameter ``"),
    ],
)
def test_a_wrong_parameter_is_named(method: str, params: dict[str, object], text: str) -> None:
    found = send(request(method, **params))
    assert isinstance(found.error, InvalidParams)
    assert found.error.message.startswith(text)
    assert found.waiting is None
    assert found.reply == {"jsonrpc": "2.0", "error": found.error.to_wire(), "id": 1}


async def test_a_call_runs_with_its_defaults_filled_in() -> None:
    same = call()
    for asked, result in (
        (request("create", id="a"), {"warnings": []}),
        (request("create", id="b", parent="a"), {"warnings": []}),
        (request("list", after="a", limit=10 * MAX_PAGE), {"layers": [ROW], "next": ""}),
    ):
        found = dispatch.dispatch(asked, METHODS, gate, same)
        if found.waiting is not None:
            found.answered(await found.waiting)
        assert json.loads(found.encode()) == {"jsonrpc": "2.0", "id": 1, "result": result}


ROW = {"id": "b", "parent": "a", "depth": 0, "references": 0, "mounted": False} | {
    "created": 1.5,
    "sealed": False,
}


@pytest.mark.parametrize("method", ["get", "create"], ids=["fast path", "library"])
def test_the_gate_is_asked_before_the_parameters_are_looked_at(method: str) -> None:
    def closed(method: Method) -> None:
        raise PermissionDenied(method.name)

    found = dispatch.dispatch(request(method, nonsense=1), METHODS, closed, call())
    assert isinstance(found.error, PermissionDenied)


@pytest.mark.parametrize("method", ["get", "put"])
def test_the_fast_path_and_the_library_give_the_same_reply(method: str) -> None:
    """`get` and `put` by name go past the library; what it would have said is the same."""
    through = Methods(METHODS.registered, {})
    for params in ({"id": "a"}, {"id": "none"}, {"id": 1}, {"x": 1}, {"id": "a", "hold": "x"}):
        replies = []
        for methods in (METHODS, through):
            driver = FakeDriver(parents={"a": None}, counts={"a": 5})
            own = Call(cast(Driver, driver), Peer(1, 2, 3), permit)
            found = dispatch.dispatch(request(method, **params), methods, gate, own)
            if found.waiting is not None:
                found.waiting.close()
            reply = found.encode() if found.waiting is None else b""
            replies.append((reply, found.outcome))
        assert replies[0] == replies[1]


def test_params_may_be_left_out() -> None:
    found = send({"jsonrpc": "2.0", "method": "ping", "id": 1})
    assert found.error is None
    assert json.loads(found.encode())["result"] == {}


@pytest.mark.parametrize(
    ("value", "claims"),
    [
        (request("diff", fd=0), True),
        ({"params": {"fd": 0}}, True),
        (request("diff", fd=0.0), True),
        (request("diff", fd=1), False),
        (request("diff", fd=False), False),
        (request("diff", fd="0"), False),
        ({"params": [0], "fd": 0}, False),
        ("fd", False),
        (None, False),
    ],
)
def test_only_a_zero_named_fd_claims(value: object, claims: bool) -> None:
    assert dispatch.claims(value) is claims
