"""JSON-RPC 2.0: a request object in, a reply out. The only place where jsonrpcserver is used.

jsonrpcserver finds the method that is registered under a name, refuses parameters that do not fit,
calls the method, and makes the reply from the Success or Error that the method returns. The library
can wait only by asyncio. So a method that has to wait returns Success(None) and leaves its
coroutine in the Request; the answer is put into the library's reply when it is there.

The library does not decide:

* what a line is (a value, a batch, another protocol): framing.py and `decode` do;
* what a request object is: `fault` does. The library's JSON schema has the same verdicts at forty
  times the cost, and its refusal has no id;
* what a batch is: the library gets its requests one at a time. It would answer a batch with one bad
  element by a single error, where the specification wants one for each element;
* the texts of MethodNotFound and InvalidParams, and the types of parameters (calls.py).

`get` and `put` with parameters by name take a fast path past it (`Method.fast_path`): the same
function is called and the same reply is made. Most of these calls only count, and the library would
double their time (docs/architecture.md has the figures).
"""

import inspect
import types
import typing
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from jsonrpcserver import Error, Result, Success, dispatch_to_serializable

from aufsd.rpc.calls import Answer, Call, Method
from aufsd.rpc.faults import translate
from aufsd_client.errors import (
    AufsdError,
    InvalidParams,
    InvalidRequest,
    MethodNotFound,
    ParseError,
)

# raises if a call may not be made: PermissionDenied, ShuttingDown, Overloaded
Gate = Callable[[Method], None]

# A line of 1 MiB has no room for more calls than this (34 bytes for the shortest, and a comma). So
# a longer batch has elements that are no calls, and a million errors would be a hundred megabytes.
MAX_BATCH = 30_000

# an element of a batch, not decoded yet
Element = msgspec.Raw

_MEMBERS = frozenset({"jsonrpc", "method", "params", "id"})
_ID_TYPES = (str, int, float, type(None))


@dataclass(slots=True)
class Request:
    """One request object, and its outcome so far.

    If `waiting` is set, somebody has to await it and call `answered` or `failed` with the outcome.
    After that `reply` is the answer for the peer, or None for a notification.
    """

    gate: Gate
    call: Call
    id: object = None
    notification: bool = False
    # None if the table has no such method
    row: Method | None = None
    # the layer's id for the log, as the peer sent it
    subject: object = None
    error: AufsdError | None = None
    waiting: Coroutine[Any, Any, Answer] | None = None
    reply: dict[str, object] | None = None
    # "ok", "cancelled", or the error's name
    outcome: str = "ok"

    def answered(self, answer: Answer | None) -> None:
        """The call was carried out."""
        if not self.notification:
            self.reply = {"jsonrpc": "2.0", "result": answer, "id": self.id}

    def failed(self, error: AufsdError) -> None:
        """The call was not."""
        self.error, self.outcome = error, type(error).__name__
        if not self.notification:
            self.reply = {"jsonrpc": "2.0", "error": error.to_wire(), "id": self.id}

    def cancelled(self) -> None:
        """The call was cut off, and is not answered."""
        self.error, self.outcome, self.reply = None, "cancelled", None

    def encode(self) -> bytes:
        """The reply as JSON. A result that JSON has no form for is an InternalError instead."""
        try:
            return _encode(self.reply)
        except Exception as raised:
            self.failed(translate(raised))
            return _encode(self.reply)


# data of an error is for reading: what JSON has no form for goes out as text
_encode = msgspec.json.Encoder(enc_hook=str).encode


def success(id: object, answer: Answer) -> bytes:
    """The reply to a call that was carried out, without its newline."""
    return _encode({"jsonrpc": "2.0", "result": answer, "id": id})


def failure(id: object, error: AufsdError) -> bytes:
    """The reply to one that was not; the id is None if none could be read."""
    return _encode({"jsonrpc": "2.0", "error": error.to_wire(), "id": id})


# --- the table for the library ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Methods:
    """`registered` is the library's table. `fast_path`: those that may be called without it."""

    registered: dict[str, Callable[..., Result]]
    fast_path: dict[str, Method]


def register(table: Mapping[str, Method]) -> Methods:
    """The methods of the table, as the library wants them."""
    return Methods(
        {name: _registered(row) for name, row in table.items()},
        {name: row for name, row in table.items() if row.fast_path},
    )


def _registered(row: Method) -> Callable[..., Result]:
    def call(request: Request, /, **params: object) -> Result:
        answer = _carry_out(row, request, params)
        if request.error is not None:
            return Error(**request.error.to_wire())
        return Success(answer)

    # the library takes the signature at every call, which is half of its time
    call.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    return call


def _carry_out(row: Method, request: Request, params: dict[str, object]) -> Answer | None:
    """Call the method. Its answer, or None: then `error` or `waiting` is set."""
    request.row = row
    request.subject = params.get("id")
    try:
        request.gate(row)
        answer = row.function(request.call, **row.parse(params))
    except Exception as raised:
        request.failed(translate(raised))
        return None
    if isinstance(answer, types.CoroutineType):
        request.waiting = answer
        return None
    return typing.cast(Answer, answer)


# --- from the line to the reply ---------------------------------------------------------------


def decode(line: bytes | Element) -> object:
    """The JSON value of a line or an element of a batch. Raises ParseError."""
    try:
        return msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ParseError(f"not a JSON value in UTF-8: {str(error)[:200]}") from None
    except RecursionError:
        raise ParseError("not a JSON value that anybody needs: nested too deep") from None


def split_batch(line: bytes) -> list[Element]:
    """The elements of a batch, not decoded yet: decoded, a megabyte of JSON takes twenty.

    Raises ParseError, and InvalidRequest for a batch without elements or with too many.
    """
    try:
        line.decode()
        elements = _split(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ParseError(f"not a JSON value in UTF-8: {str(error)[:200]}") from None
    except RecursionError:
        raise ParseError("not a JSON value that anybody needs: nested too deep") from None
    if not elements:
        raise InvalidRequest("a batch holds at least one request")
    if len(elements) > MAX_BATCH:
        raise InvalidRequest(f"a batch has at most {MAX_BATCH} calls")
    return elements


_split = msgspec.json.Decoder(list[Element]).decode


def fault(message: object) -> str:
    """Why this is not a request object of JSON-RPC 2.0; "" if it is one.

    The verdicts are those of the library's JSON schema, except that `params` may be null.
    """
    if not isinstance(message, dict):
        return "a request is an object"
    if message.get("jsonrpc") != "2.0":
        return 'the member "jsonrpc" has to be "2.0"'
    if not isinstance(message.get("method"), str):
        return 'the member "method" has to be a string'
    if not isinstance(message.get("params"), (dict, list, type(None))):
        return 'the member "params" has to be an object'
    if "id" in message and type(message["id"]) not in _ID_TYPES:
        return 'the member "id" has to be a string, a number or null'
    if len(message) > 2 and not _MEMBERS.issuperset(message):
        return "a request has no members but jsonrpc, method, params and id"
    return ""


def readable_id(message: object) -> object:
    """The id of a value that may be no request; None if it has no valid one."""
    id = message.get("id") if isinstance(message, dict) else None
    return id if type(id) in _ID_TYPES else None


def claims(message: object) -> bool:
    """Whether a request claims a descriptor: `"fd": 0` in its params, whatever else is wrong."""
    params = message.get("params") if isinstance(message, dict) else None
    fd = params.get("fd") if isinstance(params, dict) else None
    return type(fd) in (int, float) and fd == 0


def dispatch(message: object, methods: Methods, gate: Gate, call: Call) -> Request:
    """Carry out one decoded request object, as far as that needs no waiting.

    Raises nothing. The outcome is in the Request: `reply` and `error`, or `waiting`.
    """
    request = Request(gate, call)
    if reason := fault(message):
        request.id = readable_id(message)
        request.failed(InvalidRequest(reason))
        return request
    assert isinstance(message, dict)
    request.id = message.get("id")
    request.notification = "id" not in message
    params = message.get("params")
    if type(params) is dict and (row := methods.fast_path.get(message["method"])):
        answer = _carry_out(row, request, params)
        if request.error is None and request.waiting is None:
            request.answered(answer)
        return request
    reply = dispatch_to_serializable(
        message, methods=methods.registered, context=request, deserializer=_same, validator=_same
    )
    if request.row is not None:
        request.reply = typing.cast("dict[str, object] | None", reply)
    elif message["method"] in methods.registered:
        request.failed(InvalidParams("parameters are given by name, as an object"))
    else:
        request.failed(MethodNotFound(f"there is no method {message['method'][:100]}"))
    return request


def refused(error: AufsdError, gate: Gate, call: Call, message: object = None) -> Request:
    """The outcome of a line, or of the request in it, that is refused at once."""
    request = Request(gate, call)
    if isinstance(message, dict):
        request.id, request.notification = readable_id(message), "id" not in message
    request.failed(error)
    return request


def _same(value: Any) -> Any:
    return value
