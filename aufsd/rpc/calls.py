"""What a call is: who asks, for which method, with which descriptor.

A method is a function `f(call, /, *, name: type = default)`. A method that never waits returns its
answer. A method that may have to wait returns a coroutine for it; an `async def` always does. The
signature is the only place that lists the parameters: the check of a request and the document of
`rpc.discover` are made from it.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from aufsd.driver import Driver
from aufsd.kernel.peer import Peer
from aufsd.rpc.descriptors import require_stream
from aufsd_client.errors import AufsdError, InvalidParams

# read: only asks; use: gives out mounts and content; change: changes the store
Kind = Literal["read", "use", "change"]
Answer = msgspec.Struct | dict[str, object] | msgspec.Raw


@dataclass(slots=True, frozen=True)
class Call:
    """One call, for its method. The connection owns `fd`, and closes it after the call."""

    driver: Driver
    peer: Peer
    # raises PermissionDenied if this peer may not call methods of this kind
    permit: Callable[[Kind], None]
    fd: int | None = None

    def stream(self, *, write: bool) -> int:
        """The descriptor that came with the call, checked. Raises InvalidDescriptor."""
        return require_stream(self.fd, write=write)


@dataclass(slots=True, frozen=True)
class Method:
    """One row of api.md's table."""

    name: str
    function: Callable[..., Answer | Coroutine[Any, Any, Answer]]
    kind: Kind
    # served on the monitor socket too
    monitor: bool
    # moves a tar through a descriptor
    streams: bool
    # cancelled when its peer goes away; every method that streams is
    cancel_with_peer: bool
    # called without jsonrpcserver when its parameters come by name (dispatch.py)
    fast_path: bool
    params: type[msgspec.Struct]
    # the names of its integer parameters
    integers: tuple[str, ...]
    result: Any
    # errors that it may answer beside those of every method
    errors: tuple[type[AufsdError], ...]

    def parse(self, params: dict[str, object]) -> dict[str, object]:
        """The arguments for `function`, defaults filled in; or InvalidParams."""
        for name in self.integers:
            value = params.get(name)
            # JSON has one kind of number: 5.0 is the integer (RFC 8259, section 6)
            if type(value) is float and value.is_integer():
                params = {**params, name: int(value)}
        try:
            return msgspec.structs.asdict(msgspec.convert(params, self.params))
        except msgspec.ValidationError as error:
            raise InvalidParams(f"{self.name}: {_sentence(str(error))}") from None


def method(
    function: Callable[..., Answer | Coroutine[Any, Any, Answer]],
    kind: Kind,
    *errors: type[AufsdError],
    name: str = "",
    monitor: bool = False,
    streams: bool = False,
    cancel_with_peer: bool = False,
    fast_path: bool = False,
) -> Method:
    """The row for a method's function."""
    name = name or function.__name__
    hints = typing.get_type_hints(function, include_extras=True)
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if parameter.default is inspect.Parameter.empty:
            fields.append((parameter.name, hints[parameter.name]))
        elif isinstance(parameter.default, Mapping):
            # a new mapping for each call
            empty: Any = msgspec.field(default_factory=dict)
            fields.append((parameter.name, hints[parameter.name], empty))
        else:
            fields.append((parameter.name, hints[parameter.name], parameter.default))
    # `as_` here is "as" in a request: it is a keyword of Python
    keywords = {each[0]: each[0][:-1] for each in fields if each[0].endswith("_")}
    params = msgspec.defstruct(
        f"{name}.params", fields, kw_only=True, forbid_unknown_fields=True, rename=keywords
    )
    return Method(
        name=name,
        function=function,
        kind=kind,
        monitor=monitor,
        streams=streams,
        cancel_with_peer=cancel_with_peer or streams,
        fast_path=fast_path,
        params=params,
        integers=tuple(each[0] for each in fields if _is_integer(each[1])),
        result=_answer_of(hints["return"]),
        errors=errors,
    )


def _is_integer(hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return hint is int or (
        typing.get_origin(hint) is Literal
        and all(type(value) is int for value in typing.get_args(hint))
    )


def _answer_of(hint: Any) -> Any:
    """The type of the answer; of `Answer | Coroutine` the first."""
    return typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint


_MISSING = re.compile(r"Object missing required field (`.*`)")
_UNKNOWN = re.compile(r"Object contains unknown field (`.*`)", re.DOTALL)
_WRONG = re.compile(r"(.*) - at `(?:key in )?\$\.([a-z_]+)(.*)`", re.DOTALL)


def _sentence(text: str) -> str:
    """The text of an error of msgspec, as a sentence that names the parameter."""
    if found := _MISSING.fullmatch(text):
        return f"the parameter {found[1]} is missing"
    if found := _UNKNOWN.fullmatch(text):
        return f"there is no parameter {found[1][:200]}"
    if found := _WRONG.fullmatch(text):
        return f"the parameter `{found[2]}` is not right: {found[1].lower()[:1]}{found[1][1:200]}"
    return text[:200]
