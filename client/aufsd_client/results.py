"""What the methods return: the daemon's answers as frozen dataclasses, under the same names.

A field that an answer may lack has a default. Fields that a newer daemon adds are left out. Times
are seconds since the epoch, sizes are bytes. Standard library only.
"""

import base64
import binascii
import os
from dataclasses import dataclass, field
from typing import Literal

from aufsd_client.wire import BadReply


@dataclass(frozen=True, slots=True)
class Version:
    """What the daemon is, and which API it speaks."""

    version: str
    api: int
    backend: str
    features: list[str]


@dataclass(frozen=True, slots=True)
class Empty:
    """Nothing but that there was an answer."""


@dataclass(frozen=True, slots=True)
class Job:
    """A running archive job and how far it is."""

    id: str
    kind: str
    since: float
    bytes: int
    entries: int


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the store: rows of (key, value), and the same and more as fields."""

    driver: str
    status: list[tuple[str, str]]
    backend: str
    kernel: str
    layers: int
    mounts: int
    references: int
    jobs: list[Job]
    degraded: list[str]


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """One line of `health`."""

    name: str
    status: Literal["ok", "degraded", "failing"]
    detail: str


@dataclass(frozen=True, slots=True)
class Health:
    """`status` is the worst of the checks."""

    status: Literal["ok", "degraded", "failing"]
    checks: list[HealthCheck]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Prometheus text exposition."""

    content_type: str
    text: str


@dataclass(frozen=True, slots=True)
class Exists:
    """Whether there is such a layer."""

    exists: bool

    def __bool__(self) -> bool:
        return self.exists


@dataclass(frozen=True, slots=True)
class Created:
    """The layer is there; what is worth knowing about it."""

    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Removed:
    """With `removed` false: "in-use", and by how many references, or "not-found"."""

    removed: bool
    reason: str = ""
    references: int = 0

    def __bool__(self) -> bool:
        return self.removed


@dataclass(frozen=True, slots=True)
class Got:
    """Where the layer is, and how often it is referenced now.

    `new` is false if the call's name had a reference already.
    """

    path: str
    references: int
    mounted: bool
    read_only: bool
    new: bool = True


@dataclass(frozen=True, slots=True)
class Put:
    """What is left after a `put`, and whether it dropped a reference."""

    references: int
    mounted: bool
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class Streamed:
    """A tar that went out or in, with sha256:HEX of it where that was asked for.

    `digest` is of the bytes as they were sent, `diff_id` of the tar as it is uncompressed.
    """

    size: int
    entries: int
    warnings: list[str]
    digest: str = ""
    diff_id: str = ""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of the regular files in a layer's own content."""

    size: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Allocated bytes, and inodes, of a layer's own content."""

    size: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Change:
    """One changed path, absolute inside the layer; as os.fsdecode gives it if it is not UTF-8."""

    kind: Literal["add", "modify", "delete"]
    path: str = ""
    path_base64: str = ""

    def __post_init__(self) -> None:
        if self.path_base64:
            try:
                raw = base64.b64decode(self.path_base64, validate=True)
            except binascii.Error as fault:
                raise BadReply(f"path_base64: {fault}") from None
            object.__setattr__(self, "path", os.fsdecode(raw))


@dataclass(frozen=True, slots=True)
class Changes:
    """One page; `next` is the cursor of the page after it, "" on the last."""

    changes: list[Change]
    next: str


@dataclass(frozen=True, slots=True)
class Metadata:
    """Where everything of a layer is."""

    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that keeps a mount busy, and by what.

    `sockets` are paths in it that the process has sockets bound to. `hidden`: the process perhaps
    keeps it busy, by one of so many descriptors that were sent to it and that it has not received,
    or that it has registered with io_uring.
    """

    pid: int
    comm: str
    uses: list[str]
    sockets: list[str] = field(default_factory=list)
    hidden: int = 0


@dataclass(frozen=True, slots=True)
class Holders:
    """Who keeps a mount busy. `kernel`: what does and is no process, in words."""

    holders: list[Holder]
    kernel: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FailedUnmount:
    """A mount that `cleanup` could not take down; `holders` and `kernel` as in Holders."""

    id: str
    errno: str
    holders: list[Holder]
    kernel: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Cleanup:
    """What was unmounted, and what was not."""

    unmounted: list[str]
    failed: list[FailedUnmount]


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer."""

    id: str
    parent: str
    depth: int
    references: int
    mounted: bool
    created: float = 0.0
    sealed: bool = False


@dataclass(frozen=True, slots=True)
class Layers:
    """One page; `next` is the cursor of the page after it, "" on the last."""

    layers: list[LayerRow]
    next: str


@dataclass(frozen=True, slots=True)
class Reference:
    """One reference to a layer: who took it, and whether it ends with that process."""

    pid: int
    uid: int
    comm: str
    hold: Literal["manual", "process"]
    since: float
    name: str = ""


@dataclass(frozen=True, slots=True)
class MountRow:
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


@dataclass(frozen=True, slots=True)
class MountTable:
    """The active-mount table."""

    mounts: list[MountRow]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something `check` found."""

    id: str
    problem: str
    detail: str
    repaired: bool


@dataclass(frozen=True, slots=True)
class Check:
    """What `check` found."""

    problems: list[Problem]


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """`live`: it was made under processes that use the layer. `parent` is the checkpoint."""

    parent: str
    live: bool
    references: int
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class RolledBack:
    """`discarded`: there was something to throw away."""

    parent: str
    references: int
    discarded: bool


@dataclass(frozen=True, slots=True)
class Squashed:
    """What became of the layers in between."""

    removed: list[str]
    kept: list[str]


@dataclass(frozen=True, slots=True)
class Converted:
    """False if the layer was in that dialect already."""

    converted: bool

    def __bool__(self) -> bool:
        return self.converted
