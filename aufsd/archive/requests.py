"""The messages between the daemon and the child of an archive job, as lines of JSON."""

from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct

from aufsd.results import Changes, Problem, Streamed
from aufsd.store.dialect import Dialect
from aufsd.store.idmap import IdMap


class Branch(Struct, frozen=True):
    """One layer of a chain, and its dialect."""

    id: str
    dialect: Dialect


class Limits(Struct, frozen=True):
    """Limits of a layer that an archive makes; 0 for no limit.

    `bytes` and `entries` count the layer's own content, `depth` the components of a name.
    `open_files` bounds the descriptors of a child; a hard limit of the host's may be lower.
    """

    bytes: int = 0
    entries: int = 0
    depth: int = 4096
    open_files: int = 65536


class Settings(Struct, frozen=True):
    """Settings of all jobs of a store."""

    uid_maps: tuple[IdMap, ...] = ()
    gid_maps: tuple[IdMap, ...] = ()
    limits: Limits = Limits()
    sync: Literal["filesystem", "none"] = "filesystem"
    acls: bool = False
    namespace: Literal["trusted", "user"] = "trusted"
    # seconds that a peer may leave its end of a stream unmoved; 0 for no limit
    stream_timeout: float = 0.0
    # as Backend.node_whiteouts
    node_whiteouts: bool = False


# --- requests; beside each, the descriptors that come with it ---------------------------------


class Diff(Struct, frozen=True, tag=True):
    """Write a tar. Descriptors: where branches lie (the layer itself if `against` is None), out."""

    chain: tuple[Branch, ...]
    against: tuple[Branch, ...] | None
    digest: bool


class Apply(Struct, frozen=True, tag=True):
    """Unpack a tar. Descriptors: the staging directory, all branches, source."""

    chain: tuple[Branch, ...]
    digest: bool


class Compare(Struct, frozen=True, tag=True):
    """List changes. Descriptors: all branches."""

    chain: tuple[Branch, ...]
    against: tuple[Branch, ...]
    after: str
    limit: int


class Measure(Struct, frozen=True, tag=True):
    """Sum up file sizes. Descriptors: as for Diff, without out."""

    chain: tuple[Branch, ...]
    against: tuple[Branch, ...] | None


class Usage(Struct, frozen=True, tag=True):
    """Count what a layer takes up; synced first, with `sync`. Descriptors: as for Measure."""

    chain: tuple[Branch, ...]
    against: tuple[Branch, ...] | None
    sync: bool


class Read(Struct, frozen=True, tag=True):
    """Find marks that are none, and what aufs reads otherwise. Descriptors: all branches."""

    chain: tuple[Branch, ...]


class Fingerprint(Struct, frozen=True, tag=True):
    """Compute what an apply would record. Descriptors: the layer's content."""

    branch: Branch


class Clone(Struct, frozen=True, tag=True):
    """Copy content into staging. Descriptors: the store's root, under which both paths lie."""

    source: str
    staging: str


class Squash(Struct, frozen=True, tag=True):
    """Merge branches into staging (squash.py). Descriptors: the store's root."""

    chain: tuple[Branch, ...]
    below: tuple[Branch, ...]
    kept: tuple[str, ...]
    staging: str
    to: Dialect
    roots_hide: bool


class Convert(Struct, frozen=True, tag=True):
    """Rewrite whiteouts. Descriptors: the layer's content, and all branches if `parents` are known.

    `parents` None: what lies below the layer is not known.
    """

    to: Dialect
    parents: tuple[Branch, ...] | None = None


class Relabel(Struct, frozen=True, tag=True):
    """Put an SELinux label on every inode. Descriptors: the content."""

    label: str


Work: TypeAlias = (
    Diff
    | Apply
    | Compare
    | Measure
    | Usage
    | Read
    | Fingerprint
    | Clone
    | Squash
    | Convert
    | Relabel
)


class Request(Struct, frozen=True):
    """One job."""

    work: Work
    settings: Settings


# --- replies ----------------------------------------------------------------------------------


class Started(Struct, frozen=True, tag=True):
    """The child runs; a pidfd of it comes with this line."""


class Progress(Struct, frozen=True, tag=True):
    """How far the job is: bytes of the stream and entries."""

    bytes: int
    entries: int


class Failed(Struct, frozen=True, tag=True):
    """The job raised; `error` is AufsdError.to_wire()."""

    error: dict[str, object]


class Packed(Struct, frozen=True, tag=True):
    """Result of Diff and Apply; with what is recorded of a layer that was empty before."""

    streamed: Streamed
    fingerprint: str = ""
    # whether whiteouts were left out because nothing lies below them
    settled: bool = False


class Compared(Struct, frozen=True, tag=True):
    """Result of Compare."""

    changes: Changes


class Measured(Struct, frozen=True, tag=True):
    """Result of Measure: bytes."""

    size: int


class Used(Struct, frozen=True, tag=True):
    """Result of Usage: allocated bytes, and inodes."""

    size: int
    inodes: int


class Reading(Struct, frozen=True, tag=True):
    """Result of Read."""

    problems: tuple[Problem, ...]


class Fingerprinted(Struct, frozen=True, tag=True):
    """Result of Fingerprint."""

    fingerprint: str


class Cloned(Struct, frozen=True, tag=True):
    """Result of Clone and Squash."""


class Converted(Struct, frozen=True, tag=True):
    """Result of Convert; false if nothing was to do."""

    converted: bool


class Relabelled(Struct, frozen=True, tag=True):
    """Result of Relabel: how many inodes had another label, or none."""

    inodes: int


Result: TypeAlias = (
    Packed | Compared | Measured | Used | Reading | Fingerprinted | Cloned | Converted | Relabelled
)
Reply: TypeAlias = Started | Progress | Failed | Result

encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(Request).decode
decode_reply = msgspec.json.Decoder(Reply).decode
