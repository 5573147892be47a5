"""Maps user and group ids between a layer's archive and the host (user namespaces). Pure.

An empty map changes nothing. Otherwise an id outside of every range cannot be mapped, which is an
error and never a silent fallback (Docker's idtools: ToHost, ToContainer).
"""

from collections.abc import Sequence

from msgspec import Struct


class IdMap(Struct, frozen=True):
    """`size` ids from `container_id` in the archive are the ids from `host_id` on the host."""

    container_id: int
    host_id: int
    size: int


def to_host(maps: Sequence[IdMap], id: int) -> int | None:
    """The host's id for one in an archive; None if no range has it."""
    if not maps:
        return id
    for span in maps:
        if span.container_id <= id < span.container_id + span.size:
            return span.host_id + id - span.container_id
    return None


def to_container(maps: Sequence[IdMap], id: int) -> int | None:
    """The archive's id for one of the host; None if no range has it."""
    if not maps:
        return id
    for span in maps:
        if span.host_id <= id < span.host_id + span.size:
            return span.container_id + id - span.host_id
    return None
