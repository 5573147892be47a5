"""Client library of aufsd: `Client` is blocking, `aufsd_client.trio.Client` is it for Trio."""

from typing import TYPE_CHECKING

from aufsd_client.errors import (
    ArchiveEscape,
    AufsdError,
    BackendUnsupported,
    BadArchive,
    ConversionNeeded,
    IncompatibleFilesystem,
    InternalError,
    InvalidDescriptor,
    InvalidLabel,
    InvalidLayerId,
    InvalidParams,
    InvalidRequest,
    LabelConflict,
    LayerDamaged,
    LayerExists,
    LayerHasChildren,
    LayerInUse,
    LayerNotFound,
    LayerSealed,
    LimitExceeded,
    MethodNotFound,
    ModeConflict,
    MountFailed,
    NoSpace,
    Overloaded,
    ParentNotFound,
    ParseError,
    PermissionDenied,
    ShuttingDown,
    StoreLocked,
    StoreNotAdopted,
    StreamBroken,
    TooManyLayers,
    UnmountBusy,
)
from aufsd_client.wire import (
    DEFAULT_SOCKET,
    MONITOR_SOCKET,
    BadReply,
    ConnectionLost,
    DaemonUnreachable,
)

if TYPE_CHECKING:
    from aufsd_client.client import Client

__version__ = "0.2.0"

__all__ = [
    "DEFAULT_SOCKET",
    "MONITOR_SOCKET",
    "ArchiveEscape",
    "AufsdError",
    "BackendUnsupported",
    "BadArchive",
    "BadReply",
    "Client",
    "ConnectionLost",
    "ConversionNeeded",
    "DaemonUnreachable",
    "IncompatibleFilesystem",
    "InternalError",
    "InvalidDescriptor",
    "InvalidLabel",
    "InvalidLayerId",
    "InvalidParams",
    "InvalidRequest",
    "LabelConflict",
    "LayerDamaged",
    "LayerExists",
    "LayerHasChildren",
    "LayerInUse",
    "LayerNotFound",
    "LayerSealed",
    "LimitExceeded",
    "MethodNotFound",
    "ModeConflict",
    "MountFailed",
    "NoSpace",
    "Overloaded",
    "ParentNotFound",
    "ParseError",
    "PermissionDenied",
    "ShuttingDown",
    "StoreLocked",
    "StoreNotAdopted",
    "StreamBroken",
    "TooManyLayers",
    "UnmountBusy",
]


def __getattr__(name: str) -> object:
    """`Client` when it is first asked for: aufsctl does most of its work without."""
    if name != "Client":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from aufsd_client.client import Client

    globals()[name] = Client
    return Client
