"""The OpenRPC document, made from the method table, its types and docstrings."""

import inspect
from collections.abc import Mapping
from typing import Any

import msgspec

from aufsd import __version__
from aufsd.rpc.calls import Method
from aufsd.rpc.descriptors import DESCRIPTORS
from aufsd_client.errors import BY_NAME, AufsdError

_TRANSPORT = (
    "JSON-RPC 2.0 over a Unix stream socket, one JSON value a line in UTF-8, ended by a newline. "
    f"{DESCRIPTORS}"
)
_REF = "#/components/schemas/{name}"


def document(table: Mapping[str, Method]) -> dict[str, object]:
    """The table as https://spec.open-rpc.org 1.3 wants it."""
    kinds = [row.params for row in table.values()]
    kinds += dict.fromkeys(row.result for row in table.values() if _is_struct(row.result))
    references, schemas = msgspec.json.schema_components(kinds, ref_template=_REF)
    schema_of = dict(zip(kinds, references, strict=True))
    params = {name: schemas.pop(row.params.__name__) for name, row in table.items()}
    named = sorted(
        (kind for kind in BY_NAME.values() if kind is not AufsdError),
        key=lambda kind: (kind.code, kind.__name__),
    )
    return {
        "openrpc": "1.3.2",
        "info": {
            "title": "aufsd",
            "version": __version__,
            "description": "Layered root file systems and their union mounts",
            "license": {"name": "Apache-2.0"},
            "x-transport": _TRANSPORT,
        },
        "methods": [
            _method(row, params[name], schema_of.get(row.result, {"type": "object"}))
            for name, row in table.items()
        ],
        "components": {
            "schemas": schemas,
            "errors": {kind.__name__: _error(kind) for kind in named},
        },
    }


def _is_struct(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _method(row: Method, params: dict[str, Any], result: dict[str, Any]) -> dict[str, object]:
    text = inspect.getdoc(row.function) or ""
    return {
        "name": row.name,
        "summary": text.partition("\n")[0],
        "paramStructure": "by-name",
        "params": _params(params),
        "result": {"name": "result", "schema": result},
        "errors": [{"$ref": f"#/components/errors/{name}"} for name in _errors_of(row)],
        "x-kind": row.kind,
        "x-monitor": row.monitor,
        "x-descriptor": row.streams,
    }


def _errors_of(row: Method) -> list[str]:
    return [*ANYWHERE, *(kind.__name__ for kind in row.errors)]


ANYWHERE = ("InvalidParams", "InternalError", "ShuttingDown", "Overloaded", "PermissionDenied")


def _params(schema: dict[str, Any]) -> list[dict[str, object]]:
    required = schema.get("required", [])
    return [
        {"name": name, "required": name in required, "schema": field}
        for name, field in schema["properties"].items()
    ]


def _error(kind: type[AufsdError]) -> dict[str, object]:
    return {
        "code": kind.code,
        "message": (kind.__doc__ or "").partition("\n")[0],
        "data": {"name": kind.__name__},
    }
