"""The calls of the API, typed, as data: what to send, and what comes back. Nothing is sent here.

The two clients make their methods from these functions. Standard library only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from aufsd_client import results
from aufsd_client.errors import LayerInUse

T = TypeVar("T")
Hold = Literal["manual", "process"]
Dialect = Literal["aufs", "overlay"]


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """One call: its method and parameters, the class of its result, and what has to be true of it.

    A client calls `judge` with the result; it raises one of the errors.
    """

    result: type[T]
    method: str
    params: dict[str, object] = field(default_factory=dict)
    judge: Callable[[T], None] = lambda _: None


def version() -> Request[results.Version]:
    """What the daemon is, and which API it speaks."""
    return Request(results.Version, "version")


def ping() -> Request[results.Empty]:
    """Have an answer, and nothing else."""
    return Request(results.Empty, "ping")


def status() -> Request[results.Status]:
    """The state of the store."""
    return Request(results.Status, "status")


def health() -> Request[results.Health]:
    """Whether all is well, check by check."""
    return Request(results.Health, "health")


def metrics() -> Request[results.Metrics]:
    """Counters and gauges as Prometheus text exposition."""
    return Request(results.Metrics, "metrics")


def exists(id: str) -> Request[results.Exists]:
    """Whether there is a layer of this id."""
    return Request(results.Exists, "exists", {"id": id})


def create(
    id: str,
    *,
    parent: str = "",
    mount_label: str = "",
    storage_opt: Mapping[str, str] | None = None,
) -> Request[results.Created]:
    """Make an empty layer. LayerExists, ParentNotFound, TooManyLayers."""
    params: dict[str, object] = {
        "id": id,
        "parent": parent,
        "mount_label": mount_label,
        "storage_opt": dict(storage_opt or {}),
    }
    return Request(results.Created, "create", params)


def remove(id: str, *, force: bool = False, in_use_ok: bool = False) -> Request[results.Removed]:
    """Remove a layer. LayerHasChildren, LayerInUse; UnmountBusy with `force`.

    With `in_use_ok` the result says that it is in use. One that is not there is no error: then
    the result is false.
    """

    def judge(found: results.Removed) -> None:
        if found.reason == "in-use" and not in_use_ok:
            left = f"{found.references} reference{'s' * (found.references != 1)}"
            why = f"it has {left}" if found.references else "another call reads it"
            raise LayerInUse(
                f"layer {id} is in use and stays: {why}",
                id=id,
                references=found.references,
            )

    return Request(results.Removed, "remove", {"id": id, "force": force}, judge)


def get(
    id: str,
    *,
    mount_label: str = "",
    hold: Hold = "manual",
    name: str = "",
    read_only: bool = False,
) -> Request[results.Got]:
    """Count a reference, and mount on the first. LayerNotFound, MountFailed, LabelConflict.

    ModeConflict: it is given out writable, and `read_only` is asked for, or the other way round.

    Under a `name` it counts once, however often it is asked for.
    """
    params: dict[str, object] = {"id": id, "mount_label": mount_label, "hold": hold}
    # a daemon without named-holds knows no such parameters
    if name:
        params["name"] = name
    if read_only:
        params["read_only"] = True
    return Request(results.Got, "get", params)


def put(id: str, *, name: str = "") -> Request[results.Put]:
    """Drop a reference, that of `name` if one is given; the last one unmounts. UnmountBusy."""
    params: dict[str, object] = {"id": id}
    return Request(results.Put, "put", params | ({"name": name} if name else {}))


def diff(id: str, *, parent: str = "", digest: bool = False) -> Request[results.Streamed]:
    """The layer's changes as a tar, to the descriptor that goes with the call."""
    params = {"id": id, "parent": parent, "fd": 0, "digest": digest}
    return Request(results.Streamed, "diff", params)


def apply_diff(id: str, *, parent: str = "", digest: bool = False) -> Request[results.Streamed]:
    """A tar into the layer, from the descriptor that goes with the call."""
    params = {"id": id, "parent": parent, "fd": 0, "digest": digest}
    return Request(results.Streamed, "apply_diff", params)


def diff_size(id: str, *, parent: str = "") -> Request[results.Size]:
    """Bytes of the regular files in the layer's own content."""
    return Request(results.Size, "diff_size", {"id": id, "parent": parent})


def usage(id: str) -> Request[results.Usage]:
    """Allocated bytes and inodes of the layer's own content."""
    return Request(results.Usage, "usage", {"id": id})


def seal(id: str) -> Request[results.Usage]:
    """Have the layer's content on the disk, and never changed again. LayerInUse."""
    return Request(results.Usage, "seal", {"id": id})


def changes(
    id: str, *, parent: str = "", after: str = "", limit: int = 10_000
) -> Request[results.Changes]:
    """One page of what the layer changed."""
    params = {"id": id, "parent": parent, "after": after, "limit": limit}
    return Request(results.Changes, "changes", params)


def get_metadata(id: str) -> Request[results.Metadata]:
    """Where everything of a layer is."""
    return Request(results.Metadata, "get_metadata", {"id": id})


def cleanup() -> Request[results.Cleanup]:
    """Unmount every mount of the store, whatever its count."""
    return Request(results.Cleanup, "cleanup")


def list_(*, after: str = "", limit: int = 1000, prefix: str = "") -> Request[results.Layers]:
    """One page of the layers, by id; with a `prefix`, of those whose ids begin so."""
    params: dict[str, object] = {"after": after, "limit": limit}
    # a daemon without `created` knows no such parameter
    return Request(results.Layers, "list", params | ({"prefix": prefix} if prefix else {}))


def mounts() -> Request[results.MountTable]:
    """The active-mount table."""
    return Request(results.MountTable, "mounts")


def holders(id: str) -> Request[results.Holders]:
    """The processes that keep a layer's mount busy."""
    return Request(results.Holders, "holders", {"id": id})


def check(id: str = "", *, deep: bool = False, repair: bool = False) -> Request[results.Check]:
    """Consistency of the store, or of one layer."""
    return Request(results.Check, "check", {"id": id, "deep": deep, "repair": repair})


def checkpoint(id: str, as_: str) -> Request[results.Checkpointed]:
    """Freeze what a layer holds as the layer `as_`, and go on on top. LayerExists, UnmountBusy."""
    return Request(results.Checkpointed, "checkpoint", {"id": id, "as": as_})


def rollback(id: str, *, to: str = "") -> Request[results.RolledBack]:
    """Throw away what a layer holds; with `to`, put it on that layer. UnmountBusy."""
    return Request(results.RolledBack, "rollback", {"id": id, "to": to})


def squash(id: str, onto: str) -> Request[results.Squashed]:
    """Merge the layers from `id` down to `onto`, which stays, into `id`; "": all. LayerInUse."""
    return Request(results.Squashed, "squash", {"id": id, "onto": onto})


def convert(id: str, to: Dialect) -> Request[results.Converted]:
    """Rewrite a layer's whiteouts for another union file system. LayerInUse."""
    return Request(results.Converted, "convert", {"id": id, "to": to})
