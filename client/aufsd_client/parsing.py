"""JSON values as the dataclasses of `results`, by their annotations. Standard library only.

Fields that are not known here are left out, so that an older client understands a newer daemon.
"""

import typing
from collections.abc import Callable, Hashable
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, Literal, TypeVar

from aufsd_client.wire import BadReply

T = TypeVar("T")


def parse(kind: type[T], value: object) -> T:
    """A result object of JSON as a dataclass; BadReply if it does not fit."""
    return typing.cast(T, _reader(typing.cast(Hashable, kind))(value))


@cache
def _reader(kind: Any) -> Callable[[object], object]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return _list_reader(_reader(arguments[0]))
    if origin is tuple:
        return _tuple_reader([_reader(each) for each in arguments])
    if origin is dict:
        return _dict_reader(_reader(arguments[1]))
    if origin is Literal:
        # a newer daemon may know more values than this client
        return _plain_reader(str)
    if kind is float:
        return _read_float
    if kind in (str, int, bool):
        return _plain_reader(kind)
    return _object_reader(kind)


def _plain_reader(kind: type) -> Callable[[object], object]:
    def read(value: object) -> object:
        if type(value) is not kind:
            raise BadReply(f"expected {kind.__name__}, got {type(value).__name__}")
        return value

    return read


def _read_float(value: object) -> float:
    if type(value) not in (int, float):
        raise BadReply(f"expected a number, got {type(value).__name__}")
    return float(typing.cast(float, value))


def _list_reader(item: Callable[[object], object]) -> Callable[[object], object]:
    def read(value: object) -> object:
        if not isinstance(value, list):
            raise BadReply(f"expected a list, got {type(value).__name__}")
        return [item(each) for each in value]

    return read


def _tuple_reader(items: list[Callable[[object], object]]) -> Callable[[object], object]:
    def read(value: object) -> object:
        if not isinstance(value, list) or len(value) != len(items):
            raise BadReply(f"expected a list of {len(items)}")
        return tuple(item(each) for item, each in zip(items, value, strict=True))

    return read


def _dict_reader(item: Callable[[object], object]) -> Callable[[object], object]:
    def read(value: object) -> object:
        if not isinstance(value, dict):
            raise BadReply(f"expected an object, got {type(value).__name__}")
        return {key: item(each) for key, each in value.items()}

    return read


def _object_reader(kind: Any) -> Callable[[object], object]:
    hints = typing.get_type_hints(kind)
    readers = [
        (
            field.name,
            _reader(hints[field.name]),
            field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(kind)
    ]

    def read(value: object) -> object:
        if not isinstance(value, dict):
            raise BadReply(f"expected an object, got {type(value).__name__}")
        found = {}
        for name, reader, required in readers:
            if name in value:
                found[name] = reader(value[name])
            elif required:
                raise BadReply(f"{kind.__name__}: there is no {name}")
        return kind(**found)

    return read
