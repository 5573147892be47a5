"""What a call raised, as the peer is told of it."""

import secrets
from collections.abc import Iterator
from typing import TypeGuard

import structlog
import trio

from aufsd_client.errors import AufsdError, InternalError

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
    known = [leaf for leaf in leaves if _is_answer(leaf)]
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


def _is_answer(leaf: BaseException) -> TypeGuard[AufsdError]:
    """Whether a peer may see this as it is: an InternalError is a fault that we gave a name to."""
    return isinstance(leaf, AufsdError) and not isinstance(leaf, InternalError)


def is_cancellation(raised: BaseException) -> bool:
    """Whether this is nothing but Trio's own way to stop a task."""
    return all(isinstance(leaf, trio.Cancelled) for leaf in _leaves(raised))


def _leaves(raised: BaseException) -> Iterator[BaseException]:
    if isinstance(raised, BaseExceptionGroup):
        for inner in raised.exceptions:
            yield from _leaves(inner)
    else:
        yield raised
