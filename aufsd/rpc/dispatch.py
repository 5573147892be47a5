"""JSON-RPC 2.0: a line in, a bound call out; an answer in, a line out. Here is jsonrpcserver used.

The library finds the method and checks how it is called; what it finds is bound here and awaited by
the connection, for the library's own way to await is asyncio's. It is given one request object at a
time: for a batch with one bad element it answers a single error, where the specification wants one
for each. A notification's call is taken from the context object, for the library drops its result.

What the library says to a request with parameters by name depends on the name of the method alone.
It is asked once for each name, and what it found is remembered: asking costs half of a short call.
"""

import inspect
import typing
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from jsonrpcserver import Result, Success, dispatch_to_response

from aufsd.rpc.calls import Answer, Call, Method
from aufsd_client.errors import (
    AufsdError,
    InvalidParams,
    InvalidRequest,
    MethodNotFound,
    ParseError,
)

# Asks whether this call may be made now and here; raises PermissionDenied, ShuttingDown, ...
Gate = Callable[[Method], None]
Binder = Callable[..., Result]

# A line of 1 MiB has no room for more calls than this (34 bytes for the shortest, and a comma), so
# a longer batch holds others; a million of them would be answered with a hundred million bytes.
MAX_BATCH = 30_000

_BOUND: Result = Success(None)
_MEMBERS = frozenset({"jsonrpc", "method", "params", "id"})


@dataclass(slots=True)
class Bound:
    """One request object: a call that is ready to run, or the error that it is answered with."""

    gate: Gate
    call: Call
    # None until a method of the table was found
    row: Method | None = None
    # the layer's id, for the log; whatever the peer put there
    subject: object = None
    id: object = None
    # a notification is not answered
    silent: bool = False
    run: Callable[[], Awaitable[Answer]] | None = None
    error: AufsdError | None = None


class _ByName(inspect.Signature):
    """What the library checks a call against: made once, as it asks for it at every call."""

    def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        """Refuse parameters by position; those by name are looked at by their types, later."""
        if len(args) > 1:
            raise TypeError("parameters are given by name")
        return inspect.BoundArguments(self, OrderedDict())


@dataclass(frozen=True, slots=True)
class Bindings:
    """The table as the library wants it: functions that bind a call and do not make it."""

    rows: Mapping[str, Method]
    methods: dict[str, Binder]
    # the rows that the library found
    found: dict[object, Method] = field(default_factory=dict)


def bindings(table: Mapping[str, Method]) -> Bindings:
    """Bindings for a method table."""
    return Bindings(table, {name: _binder(row) for name, row in table.items()})


def _binder(row: Method) -> Binder:
    def binder(bound: Bound, /, **params: object) -> Result:
        _bind(row, bound, params)
        return _BOUND

    binder.__signature__ = _ByName()  # type: ignore[attr-defined]
    return binder


def _bind(row: Method, bound: Bound, params: dict[str, object]) -> None:
    bound.row = row
    bound.subject = params.get("id")
    try:
        bound.gate(row)
        bound.run = partial(row.function, bound.call, **row.parse(params))
    except AufsdError as error:
        bound.error = error


def decode(line: bytes) -> object:
    """The JSON value of a line, or ParseError."""
    try:
        return msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ParseError(f"not a JSON value in UTF-8: {str(error)[:200]}") from None
    except RecursionError:
        raise ParseError("not a JSON value that anybody needs: nested too deep") from None


def fault(request: object) -> str:
    """Why this is not a request object of JSON-RPC 2.0; "" if it is one.

    The verdicts are those of the library's JSON schema, at a fortieth of its cost.
    """
    if not isinstance(request, dict):
        return "a request is an object"
    if request.get("jsonrpc") != "2.0":
        return 'the member "jsonrpc" has to be "2.0"'
    if not isinstance(request.get("method"), str):
        return 'the member "method" has to be a string'
    if "params" in request and not isinstance(request["params"], (dict, list)):
        return 'the member "params" has to be an object'
    if "id" in request and type(request["id"]) not in (str, int, float, type(None)):
        return 'the member "id" has to be a string, a number or null'
    if len(request) > 2 and not _MEMBERS.issuperset(request):
        return "a request has no members but jsonrpc, method, params and id"
    return ""


def check(request: Any) -> Any:
    """The validator that the library calls: raises on what is no request."""
    if reason := fault(request):
        raise ValueError(reason)
    return request


def claims(request: object) -> bool:
    """Whether a request claims a descriptor: `"fd": 0` in its params, whatever else is wrong."""
    params = request.get("params") if isinstance(request, dict) else None
    fd = params.get("fd") if isinstance(params, dict) else None
    return type(fd) is int and fd == 0


def bind(request: object, table: Bindings, gate: Gate, call: Call) -> Bound:
    """What one decoded request object asks for. Raises nothing; the fault is in `error`."""
    bound = Bound(gate, call)
    if reason := fault(request):
        # the specification, section 5: the id of the answer is null then
        bound.error = InvalidRequest(reason)
        return bound
    assert isinstance(request, dict)
    bound.id = request.get("id")
    bound.silent = "id" not in request
    method, params = request["method"], request.get("params", _NO_PARAMS)
    by_name = type(params) is dict
    if by_name and (row := table.found.get(method)):
        _bind(row, bound, params)
        return bound
    dispatch_to_response(
        typing.cast(str, request),  # text, were it not for the deserializer
        methods=table.methods,
        context=bound,
        deserializer=_same,
        validator=check,
    )
    if method not in table.methods:
        bound.error = MethodNotFound(f"there is no method {method[:100]}")
    elif by_name:
        table.found[method] = table.rows[method]
    else:
        # an empty list passes the library for no parameters at all
        bound.run, bound.error = None, InvalidParams("parameters are given by name, as an object")
    return bound


_NO_PARAMS: dict[str, object] = {}


def _same(value: Any) -> Any:
    return value


# --- answers ----------------------------------------------------------------------------------

_encode = msgspec.json.Encoder().encode
# data of an error is for reading: what JSON has no form for goes out as text
_encode_error = msgspec.json.Encoder(enc_hook=str).encode


def success(id: object, answer: Answer) -> bytes:
    """The reply to a call that was carried out, without its newline."""
    return _encode({"jsonrpc": "2.0", "result": answer, "id": id})


def failure(id: object, error: AufsdError) -> bytes:
    """The reply to one that was not."""
    return _encode_error({"jsonrpc": "2.0", "error": error.to_wire(), "id": id})
