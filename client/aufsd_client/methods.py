"""The methods of the API, for the blocking client and for those that await. Standard library only.

The calls are in calls.py; a line here makes one a method of all clients. In a client, the method
returns what `_ask` returns: the result, or an awaitable for it.
"""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from aufsd_client import calls
from aufsd_client.calls import Request

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class _Blocks(Protocol):
    def _ask(self, request: Request[T], /) -> T: ...


class _Awaits(Protocol):
    def _ask(self, request: Request[T], /) -> Awaitable[T]: ...


class _Method(Protocol[P, T_co]):
    """The type of a method: what it returns depends on the client that it is taken from."""

    @overload
    def __get__(self, client: _Blocks, owner: object = None, /) -> Callable[P, T_co]: ...
    @overload
    def __get__(self, client: _Awaits, owner: object = None, /) -> Callable[P, Awaitable[T_co]]: ...


def _method(build: Callable[P, Request[T]]) -> _Method[P, T]:
    """The method that makes the call that `build` describes, with its name, text and parameters."""

    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return self._ask(build(*args, **kwargs))

    signature = inspect.signature(build)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__name__ = build.__name__.rstrip("_")
    method.__doc__ = build.__doc__
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[itself, *signature.parameters.values()],
        return_annotation=signature.return_annotation.__args__[0],
    )
    return cast("_Method[P, T]", method)


class Methods:
    """One method for each of the API's but those that each kind of client has in its own way."""

    version = _method(calls.version)
    ping = _method(calls.ping)
    status = _method(calls.status)
    health = _method(calls.health)
    metrics = _method(calls.metrics)
    exists = _method(calls.exists)
    create = _method(calls.create)
    remove = _method(calls.remove)
    get = _method(calls.get)
    put = _method(calls.put)
    list = _method(calls.list_)
    diff_size = _method(calls.diff_size)
    usage = _method(calls.usage)
    seal = _method(calls.seal)
    changes = _method(calls.changes)
    get_metadata = _method(calls.get_metadata)
    cleanup = _method(calls.cleanup)
    mounts = _method(calls.mounts)
    holders = _method(calls.holders)
    check = _method(calls.check)
    checkpoint = _method(calls.checkpoint)
    rollback = _method(calls.rollback)
    squash = _method(calls.squash)
    convert = _method(calls.convert)
