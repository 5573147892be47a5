"""Who is at the other end of a connection."""

from typing import NamedTuple


class Peer(NamedTuple):
    """SO_PEERCRED at accept (unix(7)): the process that connected, in our pid namespace."""

    pid: int
    uid: int
    gid: int
