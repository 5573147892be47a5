"""The method table of docs/api.md: each function checks values and calls the driver.

The first paragraph of a docstring goes into the document of `rpc.discover`.
"""

from collections.abc import Coroutine, Mapping
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aufsd import results
from aufsd.rpc import discover
from aufsd.rpc.calls import Call, Method, method
from aufsd.rpc.descriptors import DESCRIPTORS
from aufsd.store.dialect import Dialect
from aufsd.store.ids import LayerId, parse_id, parse_label, parse_name
from aufsd_client.errors import (
    ArchiveEscape,
    BackendUnsupported,
    BadArchive,
    ConversionNeeded,
    IncompatibleFilesystem,
    InvalidDescriptor,
    InvalidLabel,
    InvalidLayerId,
    LabelConflict,
    LayerDamaged,
    LayerExists,
    LayerHasChildren,
    LayerInUse,
    LayerNotFound,
    LayerSealed,
    LimitExceeded,
    ModeConflict,
    MountFailed,
    NoSpace,
    ParentNotFound,
    StreamBroken,
    TooManyLayers,
    UnmountBusy,
)

# more than this many rows are never put into one answer; `next` leads on
MAX_PAGE = 10_000

Limit = Annotated[int, Meta(ge=1)]
# What the document says of these. parse_id and parse_label refuse with their own errors, so the
# patterns are not msgspec's to check.
_ID = "(?!.*-removing$)[A-Za-z0-9][A-Za-z0-9_.-]{0,199}"
Id = Annotated[str, Meta(extra_json_schema={"pattern": f"^{_ID}$"})]
OptionalId = Annotated[str, Meta(extra_json_schema={"pattern": f"^({_ID})?$"})]
Label = Annotated[str, Meta(extra_json_schema={"pattern": "^[^\\x00-\\x1f\\x7f\"'\\\\]{0,255}$"})]
Descriptor = Annotated[Literal[0], Meta(extra_json_schema={"description": DESCRIPTORS})]
_NONE: Mapping[str, str] = MappingProxyType({})


def _parse_optional(id: str) -> LayerId | None:
    return parse_id(id) if id else None


# --- what the monitor socket serves too -------------------------------------------------------


def version(call: Call, /) -> results.Version:
    """What this daemon is, which API it speaks, and what it can do beyond the first of its kind."""
    return call.driver.version()


def ping(call: Call, /) -> results.Empty:
    """Answer, and nothing else."""
    return results.Empty()


def status(call: Call, /) -> results.Status:
    """The state of the store in rows, Docker's four first. It walks nothing."""
    return call.driver.status()


def health(call: Call, /) -> results.Health:
    """Whether all is well, check by check; for a monitoring script to poll."""
    return call.driver.health()


def metrics(call: Call, /) -> results.Metrics:
    """Counters and gauges as Prometheus text exposition."""
    return call.driver.metrics()


def discover_(call: Call, /) -> msgspec.Raw:
    """This document."""
    return _document()


@cache
def _document() -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(discover.document(TABLE)))


# --- layers -----------------------------------------------------------------------------------


def exists(call: Call, /, *, id: Id) -> results.Exists:
    """Whether there is a layer of this id."""
    return call.driver.exists(parse_id(id))


async def create(
    call: Call,
    /,
    *,
    id: Id,
    parent: OptionalId = "",
    mount_label: Label = "",
    storage_opt: Mapping[str, str] = _NONE,
) -> results.Created:
    """Make an empty layer, on top of `parent` if that is given. All or nothing."""
    return await call.driver.create(
        parse_id(id),
        parent=_parse_optional(parent),
        mount_label=parse_label(mount_label),
        storage_opt=storage_opt,
    )


async def remove(call: Call, /, *, id: Id, force: bool = False) -> results.Removed:
    """Remove a layer that nothing stands on. One that is referenced stays, unless `force`."""
    return await call.driver.remove(parse_id(id), force=force)


async def get_metadata(call: Call, /, *, id: Id) -> results.Metadata:
    """A layer's parents and state, and where its content and mount are, as strings."""
    return await call.driver.get_metadata(parse_id(id))


async def list_(
    call: Call, /, *, after: str = "", limit: Limit = 1000, prefix: str = ""
) -> results.Layers:
    """The layers by id, one page; with a `prefix`, those whose ids begin so."""
    return await call.driver.layers(after=after, limit=min(limit, MAX_PAGE), prefix=prefix)


# --- mounts -----------------------------------------------------------------------------------


def get(
    call: Call,
    /,
    *,
    id: Id,
    mount_label: Label = "",
    hold: Literal["manual", "process"] = "manual",
    name: str = "",
    read_only: bool = False,
) -> results.Got | Coroutine[Any, Any, results.Got]:
    """Count one reference to a layer, and mount it on the first. `hold="process"` ends with you.

    A reference with a `name` counts once, and stays until it is put by that name.
    """
    return call.driver.get(
        parse_id(id),
        peer=call.peer,
        mount_label=parse_label(mount_label),
        hold=hold,
        name=parse_name(name),
        read_only=read_only,
    )


def put(call: Call, /, *, id: Id, name: str = "") -> results.Put | Coroutine[Any, Any, results.Put]:
    """Drop one reference to a layer, that of the `name` if given; the last one unmounts it."""
    return call.driver.put(parse_id(id), peer=call.peer, name=parse_name(name))


async def cleanup(call: Call, /) -> results.Cleanup:
    """Unmount every mount of the store, whatever its count, from what the kernel says."""
    return await call.driver.cleanup()


def mounts(call: Call, /) -> results.MountTable:
    """The active-mount table: what is mounted, and who holds it."""
    return call.driver.mounts()


async def holders(call: Call, /, *, id: Id) -> results.Holders:
    """The processes that keep a layer's mount busy, across mount namespaces."""
    return await call.driver.holders(parse_id(id))


# --- content ----------------------------------------------------------------------------------


async def diff(
    call: Call, /, *, id: Id, fd: Descriptor, parent: OptionalId = "", digest: bool = False
) -> results.Streamed:
    """Write what a layer changed against `parent`, as a tar, to the descriptor that came along."""
    layer, against = parse_id(id), _parse_optional(parent)
    out = call.stream(write=True)
    return await call.driver.diff(layer, parent=against, out=out, digest=digest)


async def apply_diff(
    call: Call, /, *, id: Id, fd: Descriptor, parent: OptionalId = "", digest: bool = False
) -> results.Streamed:
    """Unpack the tar that comes through the descriptor into a layer. All or nothing."""
    layer, against = parse_id(id), _parse_optional(parent)
    source = call.stream(write=False)
    return await call.driver.apply_diff(layer, parent=against, source=source, digest=digest)


async def diff_size(call: Call, /, *, id: Id, parent: OptionalId = "") -> results.Size:
    """Bytes of the regular files in a layer's own content."""
    return await call.driver.diff_size(parse_id(id), parent=_parse_optional(parent))


async def usage(call: Call, /, *, id: Id) -> results.Usage:
    """Allocated bytes and inodes of a layer's own content."""
    return await call.driver.usage(parse_id(id))


async def seal(call: Call, /, *, id: Id) -> results.Usage:
    """Write a layer's content to the disk, and let nobody change it again. Answers its size."""
    return await call.driver.seal(parse_id(id))


async def changes(
    call: Call, /, *, id: Id, parent: OptionalId = "", after: str = "", limit: Limit = MAX_PAGE
) -> results.Changes:
    """What a layer changed against `parent`, path by path, one page."""
    return await call.driver.changes(
        parse_id(id), parent=_parse_optional(parent), after=after, limit=min(limit, MAX_PAGE)
    )


# --- the store --------------------------------------------------------------------------------


async def check(
    call: Call, /, *, id: OptionalId = "", deep: bool = False, repair: bool = False
) -> results.Check:
    """Compare what is on disk, in the table of mounts and in the kernel."""
    layer = _parse_optional(id)
    if repair:
        call.permit("change")
    return await call.driver.check(id=layer, deep=deep, repair=repair)


async def checkpoint(call: Call, /, *, id: Id, as_: Id) -> results.Checkpointed:
    """Keep what a layer holds as the sealed layer `as` below it; the layer goes on."""
    return await call.driver.checkpoint(parse_id(id), below=parse_id(as_))


async def rollback(call: Call, /, *, id: Id, to: OptionalId = "") -> results.RolledBack:
    """Throw away what a layer holds of its own; with `to`, put it on that layer instead."""
    return await call.driver.rollback(parse_id(id), to=_parse_optional(to))


async def squash(call: Call, /, *, id: Id, onto: OptionalId) -> results.Squashed:
    """Merge the layers from `id` down to `onto` into `id`; `onto` stays. With "": all of them."""
    return await call.driver.squash(parse_id(id), onto=_parse_optional(onto))


async def convert(call: Call, /, *, id: Id, to: Literal["aufs", "overlay"]) -> results.Converted:
    """Rewrite a layer's whiteouts for another union file system."""
    return await call.driver.convert(parse_id(id), to=Dialect(to))


# what methods of a kind may answer beside the errors of every method
_LAYER = (InvalidLayerId, LayerNotFound, LayerDamaged)
_CREATE = (
    *(InvalidLayerId, InvalidLabel, LayerExists, ParentNotFound, LayerDamaged, LayerInUse),
    *(TooManyLayers, NoSpace),
)
_GET = (
    *(*_LAYER, InvalidLabel, MountFailed, LabelConflict, LayerInUse, BackendUnsupported),
    *(IncompatibleFilesystem, ConversionNeeded, ModeConflict, NoSpace),
)
_REPLACE = (
    *(*_LAYER, LayerHasChildren, LayerInUse, LayerSealed, UnmountBusy, MountFailed),
    *(ConversionNeeded, NoSpace, BackendUnsupported),
)
_SQUASH = (
    *(*_LAYER, ParentNotFound, LayerHasChildren, LayerInUse, LayerSealed, LimitExceeded, NoSpace),
)
_COMPARE = (*_LAYER, ParentNotFound)
_STREAM = (InvalidDescriptor, StreamBroken)
_UNPACK = (
    *(LayerHasChildren, LayerInUse, LayerSealed, BadArchive, ArchiveEscape, LimitExceeded, NoSpace),
)

TABLE: dict[str, Method] = {
    row.name: row
    for row in (
        method(version, "read", monitor=True),
        method(ping, "read", monitor=True),
        method(status, "read", monitor=True),
        method(health, "read", monitor=True),
        method(metrics, "read", monitor=True),
        method(exists, "read", InvalidLayerId),
        method(create, "change", *_CREATE),
        method(remove, "change", InvalidLayerId, LayerHasChildren, UnmountBusy, NoSpace),
        method(get, "use", *_GET, fast_path=True),
        method(put, "use", InvalidLayerId, LayerInUse, UnmountBusy, NoSpace, fast_path=True),
        method(diff, "use", *_COMPARE, *_STREAM, streams=True),
        method(apply_diff, "change", *_COMPARE, *_STREAM, *_UNPACK, streams=True),
        method(diff_size, "read", *_COMPARE),
        method(usage, "read", *_LAYER, cancel_with_peer=True),
        method(seal, "change", *_LAYER, LayerInUse, NoSpace),
        method(changes, "read", *_COMPARE),
        method(get_metadata, "read", *_LAYER),
        method(cleanup, "change"),
        method(list_, "read", name="list"),
        method(mounts, "read"),
        method(holders, "read", *_LAYER),
        method(check, "read", *_LAYER),
        method(checkpoint, "change", *_REPLACE, LayerExists, TooManyLayers),
        method(rollback, "change", *_REPLACE, ParentNotFound),
        method(squash, "change", *_SQUASH),
        method(convert, "change", *_LAYER, LayerInUse, IncompatibleFilesystem, NoSpace),
        method(discover_, "read", name="rpc.discover", monitor=True),
    )
}
