"""Translates what a call raised into an error of the API."""

import errno
import secrets
from collections.abc import Iterator

import structlog
import trio

from aufsd_client.errors import AufsdError, InternalError, NoSpace, Overloaded

log = structlog.get_logger(__name__)

_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


def translate(raised: BaseException) -> AufsdError:
    """The API's error for whatever a call raised.

    A nursery raises a group; if all in it are errors of the API, the answer is the first of them.
    Any other exception becomes an InternalError with the number of an incident. The log has the
    traceback under the same number. KeyboardInterrupt and SystemExit are raised again.
    """
    leaves = [leaf for leaf in _leaves(raised) if not isinstance(leaf, trio.Cancelled)]
    for leaf in leaves:
        if not isinstance(leaf, Exception):
            raise raised
    known = [answer for answer in map(_answer, leaves) if answer is not None]
    if known and len(known) == len(leaves):
        return known[0]
    incident = secrets.token_hex(8)
    # the traceback of an archive job is text from the child process
    told = {key: value for leaf in leaves for key, value in getattr(leaf, "data", {}).items()}
    log.error("incident", exc_info=raised, **told, incident=incident)
    return InternalError(
        f"the daemon failed in a way it did not expect; its log tells more of incident {incident}",
        incident=incident,
    )


def _answer(leaf: BaseException) -> AufsdError | None:
    """What the peer is told; None for a fault of aufsd, which an InternalError is too.

    A full disk is not a fault of aufsd, wherever it is met, nor is a host that has no descriptor,
    memory or process left.
    """
    short = shortage(leaf)
    if short is not None:
        return short
    if isinstance(leaf, OSError) and leaf.errno in (errno.ENOSPC, errno.EDQUOT):
        name = errno.errorcode[leaf.errno]
        return NoSpace(f"the store takes no more: {leaf.strerror}; free space first", errno=name)
    if isinstance(leaf, AufsdError) and not isinstance(leaf, InternalError):
        return leaf
    return None


def shortage(raised: BaseException) -> Overloaded | None:
    """The error of a call, or a connection, that the host has too little for; None for another."""
    if isinstance(raised, RuntimeError) and "can't start new thread" in str(raised):
        # pthread_create(3) failed with EAGAIN, which Python does not say
        lacks, name = "it can start no thread", "EAGAIN"
    elif isinstance(raised, OSError) and raised.errno in _SHORT:
        lacks, name = str(raised.strerror), errno.errorcode[raised.errno]
    elif isinstance(raised, MemoryError):
        lacks, name = "it has no memory left", "ENOMEM"
    else:
        return None
    return Overloaded(f"the host has too little for this now: {lacks}; try again", errno=name)


def is_cancellation(raised: BaseException) -> bool:
    """Whether this is only Trio's cancellation of a task."""
    return all(isinstance(leaf, trio.Cancelled) for leaf in _leaves(raised))


def _leaves(raised: BaseException) -> Iterator[BaseException]:
    if isinstance(raised, BaseExceptionGroup):
        for inner in raised.exceptions:
            yield from _leaves(inner)
    else:
        yield raised
