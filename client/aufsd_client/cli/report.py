"""Errors for a person: the sentence, a line that says what to do, and the exit status."""

from enum import IntEnum

from aufsd_client import errors
from aufsd_client.wire import BadReply


class Exit(IntEnum):
    """The exit statuses of aufsctl, as its man page lists them."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    BUSY = 5


_STATUS: dict[type[BaseException], Exit] = {
    errors.LayerNotFound: Exit.NOT_FOUND,
    errors.ParentNotFound: Exit.NOT_FOUND,
    errors.LayerInUse: Exit.BUSY,
    errors.UnmountBusy: Exit.BUSY,
    errors.Overloaded: Exit.BUSY,
    errors.ModeConflict: Exit.BUSY,
}

# {id} and other names are of the error's data; a hint whose names it lacks is left out
_HINTS: dict[type[BaseException], tuple[str, ...]] = {
    errors.InvalidDescriptor: (
        "standard input and output have to be a file, a pipe or a socket; try `... | cat`",
    ),
    errors.InternalError: ("see `journalctl -u aufsd`, incident {incident}",),
    errors.ShuttingDown: ("try again when it has started again",),
    errors.Overloaded: ("try again later",),
    errors.LayerNotFound: ("`aufsctl list` shows the layers that there are",),
    errors.LayerExists: ("nothing was changed; `aufsctl inspect {id}` shows it",),
    errors.ParentNotFound: ("create it first: `aufsctl create {parent}`",),
    errors.LayerHasChildren: ("remove what stands on it first: {children}",),
    errors.LayerInUse: ("`aufsctl mounts` shows who holds it, `aufsctl put {id}` drops one",),
    errors.LayerSealed: ("make one on it: `aufsctl create NEW --parent {id}`",),
    errors.LayerDamaged: ("`aufsctl check {id} --deep` says more",),
    errors.MountFailed: ("the kernel's log may say more: `dmesg | tail`",),
    errors.UnmountBusy: (
        # with names, nobody uses it: they cannot be kept
        "mend the store's file system, then `aufsctl put {id}` again; not kept: {names}",
        "end what uses it, then `aufsctl put {id}` again",
    ),
    errors.BackendUnsupported: ("`aufsd probe` shows what this host can do",),
    errors.LabelConflict: ("it is mounted with the label {label}",),
    errors.ConversionNeeded: ("run `{command}`",),
    errors.BadArchive: ("at byte {offset}, entry {entry}", "at byte {offset}"),
    errors.LimitExceeded: ("the daemon's configuration sets the limit",),
    errors.NoSpace: ("free some space in the store's file system, then try again",),
    errors.PermissionDenied: (
        "layer {id} is at {path} in the daemon's mount namespace",
        "the control socket is for root and the group aufsd",
    ),
}


def describe(error: Exception) -> tuple[str, str, Exit]:
    """What to say of an error, what to do about it ("" if that is not known), the exit status."""
    if isinstance(error, errors.AufsdError):
        return error.message, _hint(error), _STATUS.get(type(error), Exit.REFUSED)
    if isinstance(error, BadReply):
        return str(error), "is it aufsd that listens there?", Exit.UNREACHABLE
    if isinstance(error, TimeoutError):
        return str(error), "whether it carries the call out is not known", Exit.UNREACHABLE
    if isinstance(error, ConnectionError):
        return str(error), "", Exit.UNREACHABLE
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", "", Exit.REFUSED
    return str(error), "", Exit.REFUSED


def _hint(error: errors.AufsdError) -> str:
    data = {key: _words(value) for key, value in error.data.items()}
    for hint in _HINTS.get(type(error), ()):
        try:
            text = hint.format_map(data)
        except KeyError:
            continue
        return text + _holders(error.data.get("holders"))
    return _holders(error.data.get("holders")).lstrip("; ")


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _holders(found: object) -> str:
    """The processes that an error names."""
    if not isinstance(found, list) or not found:
        return ""
    named = [f"{each.get('comm')} ({each.get('pid')})" for each in found if isinstance(each, dict)]
    return f"; held by {', '.join(named)}"
