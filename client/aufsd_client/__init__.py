"""Client library of aufsd: `Client` is blocking, `aufsd_client.trio.Client` is it for Trio."""

from aufsd_client.client import Client
from aufsd_client.errors import AufsdError
from aufsd_client.wire import (
    DEFAULT_SOCKET,
    MONITOR_SOCKET,
    BadReply,
    ConnectionLost,
    DaemonUnreachable,
)

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_SOCKET",
    "MONITOR_SOCKET",
    "AufsdError",
    "BadReply",
    "Client",
    "ConnectionLost",
    "DaemonUnreachable",
]
