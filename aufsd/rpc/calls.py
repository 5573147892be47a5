"""What a call is: who asks, for which method, with which descriptor; the driver as seen from here.

A method is an async function `f(call, /, *, name: type = default) -> answer`. Its signature is the
only place where its parameters are written down: the check of what arrives and the document of
`rpc.discover` are both made from it.
"""

import inspect
import re
import typing
from collections.abc import Awaitable, Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec

from aufsd import results
from aufsd.kernel.peer import Peer
from aufsd.rpc.descriptors import require_stream
from aufsd.store.dialect import Dialect
from aufsd.store.ids import LayerId
from aufsd_client.errors import InvalidParams

# read: asks; use: mounts and content go out; change: the store is another one afterwards
Kind = Literal["read", "use", "change"]
Answer = msgspec.Struct | dict[str, object]


class Turn(Protocol):
    """Around calls that are made in one go (aufsd.active.turn.Turn)."""

    @property
    def unwritten(self) -> Sized:
        """While there is something in it, no call may be answered; always the same object."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class Operations(Protocol):
    """The driver (aufsd.driver.Driver), as much of it as the API needs."""

    @property
    def turn(self) -> Turn: ...
    def version(self) -> results.Version: ...
    def status(self) -> results.Status: ...
    def health(self) -> results.Health: ...
    def metrics(self) -> results.Metrics: ...
    def exists(self, id: LayerId) -> results.Exists: ...
    def layers(self, *, after: str, limit: int) -> results.Layers: ...
    def mounts(self) -> results.MountTable: ...
    async def create(
        self,
        id: LayerId,
        *,
        parent: LayerId | None,
        mount_label: str,
        storage_opt: Mapping[str, str],
    ) -> results.Created: ...
    async def remove(self, id: LayerId, *, force: bool) -> results.Removed: ...
    async def get(
        self,
        id: LayerId,
        *,
        peer: Peer,
        mount_label: str,
        hold: Literal["manual", "process"],
        name: str = "",
    ) -> results.Got: ...
    async def put(self, id: LayerId, *, peer: Peer, name: str = "") -> results.Put: ...
    async def diff(
        self, id: LayerId, *, parent: LayerId | None, out: int, digest: bool
    ) -> results.Streamed: ...
    async def apply_diff(
        self, id: LayerId, *, parent: LayerId | None, source: int, digest: bool
    ) -> results.Streamed: ...
    async def diff_size(self, id: LayerId, *, parent: LayerId | None) -> results.Size: ...
    async def changes(
        self, id: LayerId, *, parent: LayerId | None, after: str, limit: int
    ) -> results.Changes: ...
    async def get_metadata(self, id: LayerId) -> results.Metadata: ...
    async def cleanup(self) -> results.Cleanup: ...
    async def holders(self, id: LayerId) -> results.Holders: ...
    async def check(self, *, id: LayerId | None, deep: bool, repair: bool) -> results.Check: ...
    async def convert(self, id: LayerId, *, to: Dialect) -> results.Converted: ...


@dataclass(slots=True, frozen=True)
class Call:
    """One call as its method sees it. `fd` is the connection's, which closes it after the call."""

    driver: Operations
    peer: Peer
    # whether this peer may do what this kind of method does, or PermissionDenied
    permit: Callable[[Kind], None]
    fd: int | None = None

    def stream(self, *, write: bool) -> int:
        """The descriptor that came with the call, checked; or InvalidDescriptor."""
        return require_stream(self.fd, write=write)


@dataclass(slots=True, frozen=True)
class Method:
    """One row of api.md's table."""

    name: str
    function: Callable[..., Awaitable[Answer]]
    kind: Kind
    # served on the monitor socket too
    monitor: bool
    # moves a tar: cancelled when its peer goes away
    streams: bool
    params: type[msgspec.Struct]
    result: Any

    def parse(self, params: dict[str, object]) -> dict[str, object]:
        """The arguments for `function`, defaults filled in; or InvalidParams."""
        try:
            return msgspec.structs.asdict(msgspec.convert(params, self.params))
        except msgspec.ValidationError as error:
            raise InvalidParams(f"{self.name}: {_sentence(str(error))}") from None


def method(
    function: Callable[..., Awaitable[Answer]],
    kind: Kind,
    *,
    name: str = "",
    monitor: bool = False,
    streams: bool = False,
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
            # "storage_opt={}": a fresh one for each call
            empty: Any = msgspec.field(default_factory=dict)
            fields.append((parameter.name, hints[parameter.name], empty))
        else:
            fields.append((parameter.name, hints[parameter.name], parameter.default))
    params = msgspec.defstruct(f"{name}.params", fields, kw_only=True, forbid_unknown_fields=True)
    return Method(name, function, kind, monitor, streams, params, hints["return"])


_MISSING = re.compile(r"Object missing required field (`.*`)")
_UNKNOWN = re.compile(r"Object contains unknown field (`.*`)", re.DOTALL)
_WRONG = re.compile(r"(.*) - at `(?:key in )?\$\.([a-z_]+)(.*)`", re.DOTALL)


def _sentence(text: str) -> str:
    """What msgspec says of a value, as a sentence that names the parameter."""
    if found := _MISSING.fullmatch(text):
        return f"the parameter {found[1]} is missing"
    if found := _UNKNOWN.fullmatch(text):
        return f"there is no parameter {found[1][:200]}"
    if found := _WRONG.fullmatch(text):
        return f"the parameter `{found[2]}` is not right: {found[1].lower()[:1]}{found[1][1:200]}"
    return text[:200]
