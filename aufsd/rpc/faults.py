"""What a call raised, as the peer is told of it."""

import errno
import secrets
from collections.abc import Iterator

import structlog
import trio

from aufsd_client.errors import AufsdError, InternalError, NoSpace

log = structlog.get_logger(__name__)


def translate(raised: BaseException) -> AufsdError:
    """The API's error for whatever a call raised.

    A nursery wraps what its tasks raise: a group of errors of the API alone is the first of them.
    Nothing else of an exception leaves the daemon but the number of an incident, which the log has
    too. Raises again what is not for us: KeyboardInterrupt, SystemExit.
    """
    leaves = [leaf for leaf in _leaves(raised) if not isinstance(leaf, trio.Cancelled)]
    for leaf in leaves:
        if not isinstance(leaf, Exception):
            raise raised
    known = [answer for answer in map(_answer, leaves) if answer is not None]
    if known and len(known) == len(leaves):
        return known[0]
    incident = secrets.token_hex(8)
    # an archive job's exception comes from another process, as text
    told = {key: value for leaf in leaves for key, value in getattr(leaf, "data", {}).items()}
    log.error("incident", exc_info=raised, **told, incident=incident)
    return InternalError(
        f"the daemon failed in a way it did not expect; its log tells more of incident {incident}",
        incident=incident,
    )


def _answer(leaf: BaseException) -> AufsdError | None:
    """What a peer may see of this: an InternalError is a fault that we gave a name to.

    A full disk is met anywhere, also where a store makes a directory for itself.
    """
    if isinstance(leaf, OSError) and leaf.errno in (errno.ENOSPC, errno.EDQUOT):
        name = errno.errorcode[leaf.errno]
        return NoSpace(f"the store takes no more: {leaf.strerror}; free space first", errno=name)
    if isinstance(leaf, AufsdError) and not isinstance(leaf, InternalError):
        return leaf
    return None


def is_cancellation(raised: BaseException) -> bool:
    """Whether this is nothing but Trio's own way to stop a task."""
    return all(isinstance(leaf, trio.Cancelled) for leaf in _leaves(raised))


def _leaves(raised: BaseException) -> Iterator[BaseException]:
    if isinstance(raised, BaseExceptionGroup):
        for inner in raised.exceptions:
            yield from _leaves(inner)
    else:
        yield raised
