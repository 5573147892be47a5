"""The bodies of the protocol: moby daemon/graphdriver/proxy.go and pkg/plugins.

Go writes every field of a request, and reads a missing one as empty; so does this.
"""

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

MEDIA_TYPE: Final = "application/vnd.docker.plugins.v1.2+json"
# moby pkg/archive: ChangeModify, ChangeAdd, ChangeDelete
KINDS: Final = {"modify": 0, "add": 1, "delete": 2}


class Arguments(Struct, rename="pascal"):
    """graphDriverRequest, and what Init and the two Creates have beside it."""

    id: str = msgspec.field(name="ID", default="")
    parent: str | None = ""
    mount_label: str | None = ""
    storage_opt: dict[str, str] | None = None
    # of Init
    home: str | None = ""


class Answer(Struct, omit_defaults=True):
    """graphDriverResponse: an error, and what the method gives."""

    error: str = msgspec.field(name="Err", default="")
    directory: str = msgspec.field(name="Dir", default="")
    exists: bool = msgspec.field(name="Exists", default=False)
    status: list[tuple[str, str]] | None = msgspec.field(name="Status", default=None)
    metadata: dict[str, str] | None = msgspec.field(name="Metadata", default=None)
    changes: list["Change"] | None = msgspec.field(name="Changes", default=None)
    size: int = msgspec.field(name="Size", default=0)
    capabilities: "Capabilities | None" = msgspec.field(name="Capabilities", default=None)
    implements: list[str] | None = msgspec.field(name="Implements", default=None)


class Change(Struct):
    """One path that a layer changed; `kind` as in KINDS."""

    path: str = msgspec.field(name="Path")
    kind: Annotated[int, Meta(ge=0, le=2)] = msgspec.field(name="Kind")


class Capabilities(Struct):
    """graphdriver.Capabilities."""

    # false: Docker keeps the tar's headers itself, and reads the files through Get
    reproduces_exact_diffs: bool = msgspec.field(name="ReproducesExactDiffs", default=False)


_decoder = msgspec.json.Decoder(Arguments)
_encoder = msgspec.json.Encoder()


def decode(body: bytes) -> Arguments:
    """The arguments of a call. Raises msgspec.MsgspecError for what is none."""
    return _decoder.decode(body or b"{}")


def encode(answer: Answer) -> bytes:
    """An answer's body."""
    return _encoder.encode(answer)
