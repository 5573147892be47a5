"""The error table of the API: one class per name, raised by the daemon, raised again by clients.

An error crosses the socket as `{"code", "message", "data": {"name", ...}}`. The name is what
programs match; it is the class's own name. Standard library only.
"""

from typing import ClassVar


class AufsdError(Exception):
    """Any error of the API. `message` is a sentence for a person; `data` is for programs."""

    code: ClassVar[int] = -32603

    def __init__(self, message: str, /, **data: object) -> None:
        super().__init__(message)
        self.message = message
        self.data = data

    def to_wire(self) -> dict[str, object]:
        """The JSON-RPC error object."""
        data = {"name": type(self).__name__, **self.data}
        return {"code": self.code, "message": self.message, "data": data}


# --- JSON-RPC 2.0's own, and what refines them ------------------------------------------------


class ParseError(AufsdError):
    """The line is not JSON."""

    code = -32700


class InvalidRequest(AufsdError):
    """The JSON is not a JSON-RPC 2.0 request, or its line is too long."""

    code = -32600


class MethodNotFound(AufsdError):
    """No method of this name."""

    code = -32601


class InvalidParams(AufsdError):
    """A parameter is unknown, missing, or of the wrong type or value."""

    code = -32602


class InvalidLayerId(InvalidParams):
    """Not a layer id: a letter or digit, then letters, digits, "_", "." or "-"; 200 at most."""


class InvalidLabel(InvalidParams):
    """Not an SELinux context that can be put into mount options."""


class InvalidDescriptor(InvalidParams):
    """No descriptor came with the call, or one that cannot carry the stream."""


class InternalError(AufsdError):
    """A fault of the daemon; `data["incident"]` is in its log too."""

    code = -32603


class ShuttingDown(AufsdError):
    """The daemon is draining and takes no new calls."""

    code = -32000


class Overloaded(AufsdError):
    """A configured limit of connections, calls or jobs is reached, or the host has too little.

    Of what it has too little `errno` says: file descriptors, memory, threads.
    """

    code = -32001


# --- layers -----------------------------------------------------------------------------------


class LayerNotFound(AufsdError):
    """No layer has this id."""

    code = 101


class LayerExists(AufsdError):
    """The id is taken; nothing was changed."""

    code = 102


class ParentNotFound(AufsdError):
    """The parent named does not exist."""

    code = 103


class LayerHasChildren(AufsdError):
    """Other layers stand on this one; `data["children"]` has the first 20."""

    code = 104


class LayerInUse(AufsdError):
    """The layer, or one that stands on it, is referenced or being worked on."""

    code = 105


class LayerDamaged(AufsdError):
    """The layer is in quarantine; `data["problem"]` says why."""

    code = 106


class ModeConflict(AufsdError):
    """Asked for read-only, and it is given out writable; or the other way round."""

    code = 107


class LayerSealed(AufsdError):
    """The layer was sealed: its content changes no more."""

    code = 108


# --- mounts -----------------------------------------------------------------------------------


class MountFailed(AufsdError):
    """The kernel refused the mount; nothing is left mounted, the count is as before."""

    code = 201


class UnmountBusy(AufsdError):
    """Something keeps the mount busy; `data["holders"]` names it."""

    code = 202


class BackendUnsupported(AufsdError):
    """The kernel or the host lacks what this union file system needs."""

    code = 203


class IncompatibleFilesystem(AufsdError):
    """The store lies on a file system that this union file system cannot stand on."""

    code = 204


class TooManyLayers(AufsdError):
    """The chain would be longer than the union file system takes."""

    code = 205


class LabelConflict(AufsdError):
    """The layer is mounted with another SELinux label."""

    code = 206


class ConversionNeeded(AufsdError):
    """A branch is written in the other whiteout dialect and converting is off."""

    code = 207


# --- archives ---------------------------------------------------------------------------------


class BadArchive(AufsdError):
    """Not a tar stream, or one that is cut short or out of range."""

    code = 301


class ArchiveEscape(AufsdError):
    """An entry that would leave the layer, or forge the union's own metadata."""

    code = 302


class StreamBroken(AufsdError):
    """Reading or writing the passed descriptor failed."""

    code = 303


class LimitExceeded(AufsdError):
    """The layer would exceed the configured bytes or entries."""

    code = 304


class NoSpace(AufsdError):
    """The file system of the store is full, or a quota is."""

    code = 305


# --- access and store -------------------------------------------------------------------------


class PermissionDenied(AufsdError):
    """This peer or this socket may not call the method."""

    code = 401


class StoreNotAdopted(AufsdError):
    """The root holds layers that aufsd did not make, and adopting was not asked for."""

    code = 501


class StoreLocked(AufsdError):
    """Another process owns this root."""

    code = 502


def _named(base: type[AufsdError]) -> dict[str, type[AufsdError]]:
    found = {base.__name__: base}
    for child in base.__subclasses__():
        found |= _named(child)
    return found


BY_NAME = _named(AufsdError)


def from_wire(error: dict[str, object]) -> AufsdError:
    """The exception for a JSON-RPC error object; a name unknown here becomes a plain AufsdError."""
    data = error.get("data")
    data = {str(key): value for key, value in data.items()} if isinstance(data, dict) else {}
    name = data.pop("name", None)
    found = BY_NAME.get(name) if isinstance(name, str) else None
    made = (found or AufsdError)(str(error.get("message", "")), **data)
    code = error.get("code")
    if found is None and isinstance(code, int):
        made.code = code  # type: ignore[misc]  # an error of a newer daemon keeps its own code
    return made
