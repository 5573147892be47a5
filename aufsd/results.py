"""The result objects of the API, typed (docs/api.md): the driver returns them.

A field may be added; none may be renamed or dropped without a new `api` number. Times are seconds
since the epoch. `UNSET` fields do not appear on the wire.
"""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class Version(Struct, frozen=True):
    """Answer of `version`."""

    version: str
    api: int
    backend: str
    features: list[str]


class Empty(Struct, frozen=True):
    """Answer of `ping`."""


class Status(Struct, frozen=True):
    """Answer of `status`: Docker's rows first, then more rows, then typed fields."""

    driver: str
    status: list[tuple[str, str]]
    backend: str
    kernel: str
    layers: int
    mounts: int
    references: int
    jobs: list["Job"]
    degraded: list[str]


class Job(Struct, frozen=True):
    """A running archive job and how far it is."""

    id: str
    kind: str
    since: float
    bytes: int
    entries: int


class HealthCheck(Struct, frozen=True):
    """One line of `health`."""

    name: str
    status: Literal["ok", "degraded", "failing"]
    detail: str


class Health(Struct, frozen=True):
    """Answer of `health`: `status` is the worst of its checks."""

    status: Literal["ok", "degraded", "failing"]
    checks: list[HealthCheck]


class Metrics(Struct, frozen=True):
    """Answer of `metrics`: Prometheus text exposition."""

    content_type: str
    text: str


class Exists(Struct, frozen=True):
    """Answer of `exists`."""

    exists: bool


class Created(Struct, frozen=True):
    """Answer of `create`."""

    warnings: list[str]


class Removed(Struct, frozen=True):
    """Answer of `remove`; with `removed` false, the reason."""

    removed: bool
    reason: Literal["in-use", "not-found"] | UnsetType = UNSET
    references: int | UnsetType = UNSET


class Got(Struct, frozen=True):
    """Answer of `get`. `new`: one reference more; not for a name that has one already."""

    path: str
    references: int
    mounted: bool
    read_only: bool
    new: bool


class Put(Struct, frozen=True):
    """Answer of `put`. `dropped`: one reference less."""

    references: int
    mounted: bool
    dropped: bool


class Streamed(Struct, frozen=True):
    """Answer of `diff` and `apply_diff`: digests of the stream, and of the tar that it holds."""

    size: int
    entries: int
    warnings: list[str]
    digest: str | UnsetType = UNSET
    diff_id: str | UnsetType = UNSET


class Size(Struct, frozen=True):
    """Answer of `diff_size`: bytes."""

    size: int


class Usage(Struct, frozen=True):
    """Answer of `usage` and `seal`: allocated bytes, and inodes, of a layer's own content."""

    size: int
    inodes: int


class Change(Struct, frozen=True):
    """One changed path, absolute inside the layer; `path_base64` where it is not UTF-8."""

    kind: Literal["add", "modify", "delete"]
    path: str | UnsetType = UNSET
    path_base64: str | UnsetType = UNSET


class Changes(Struct, frozen=True):
    """Answer of `changes`: one page."""

    changes: list[Change]
    next: str


class Metadata(Struct, frozen=True):
    """Answer of `get_metadata`."""

    metadata: dict[str, str]


class Holder(Struct, frozen=True):
    """A process that keeps a mount busy, and by what.

    `sockets` are paths in it that the process has sockets bound to. `hidden`, then the only use, is
    how many descriptors the kernel keeps for the process outside of its table: sent to a socket and
    not received, or registered with io_uring. One of them may be of this mount.
    """

    pid: int
    comm: str
    uses: list[Literal["cwd", "root", "exe", "fd", "map", "mount-namespace"]]
    sockets: list[str] | UnsetType = UNSET
    hidden: int | UnsetType = UNSET


class Holders(Struct, frozen=True):
    """Answer of `holders`. `kernel`: what holds the mount and is no process, in words."""

    holders: list[Holder]
    kernel: list[str] = []


class FailedUnmount(Struct, frozen=True):
    """A mount that `cleanup` could not take down."""

    id: str
    errno: str
    holders: list[Holder]
    kernel: list[str] = []


class Cleanup(Struct, frozen=True):
    """Answer of `cleanup`."""

    unmounted: list[str]
    failed: list[FailedUnmount]


class LayerRow(Struct, frozen=True):
    """One layer of `list`."""

    id: str
    parent: str
    depth: int
    references: int
    mounted: bool
    created: float
    sealed: bool


class Layers(Struct, frozen=True):
    """Answer of `list`: one page, sorted by id."""

    layers: list[LayerRow]
    next: str


class Reference(Struct, frozen=True):
    """One reference to a layer: who took it, and whether it ends with that process."""

    pid: int
    uid: int
    comm: str
    hold: Literal["manual", "process"]
    since: float
    name: str


class MountRow(Struct, frozen=True):
    """One entry of the active-mount table."""

    id: str
    path: str
    backend: str
    references: int
    mounted: bool
    read_only: bool
    label: str
    since: float
    holders: list[Reference]


class MountTable(Struct, frozen=True):
    """Answer of `mounts`."""

    mounts: list[MountRow]


class Problem(Struct, frozen=True):
    """Something `check` found."""

    id: str
    problem: str
    detail: str
    repaired: bool


class Check(Struct, frozen=True):
    """Answer of `check`."""

    problems: list[Problem]


class Checkpointed(Struct, frozen=True):
    """Answer of `checkpoint`: `live` if it was made under processes that use the layer."""

    parent: str
    live: bool
    references: int
    warnings: list[str]


class RolledBack(Struct, frozen=True):
    """Answer of `rollback`: `discarded` if there was something to throw away."""

    parent: str
    references: int
    discarded: bool


class Squashed(Struct, frozen=True):
    """Answer of `squash`: what became of the layers in between."""

    removed: list[str]
    kept: list[str]


class Converted(Struct, frozen=True):
    """Answer of `convert`; false if the layer was in that dialect already."""

    converted: bool
