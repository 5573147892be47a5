"""Who is at the other end of a connection."""

from typing import NamedTuple


class Peer(NamedTuple):
    """SO_PEERCRED at accept (unix(7)): the process that connected, in our pid namespace.

    `start` is its start time in clock ticks since boot, which with the pid names a process for
    good; 0 and an empty `comm` for one that was gone already.
    """

    pid: int
    uid: int
    gid: int
    comm: str = ""
    start: int = 0


def identify(pid: int, uid: int, gid: int) -> Peer:
    """The peer, with what /proc says of it. Reading /proc does not block."""
    comm, start = process(pid)
    return Peer(pid, uid, gid, comm, start)


def process(pid: int) -> tuple[str, int]:
    """Name and start time of a process (proc_pid_stat(5), fields 2 and 22); ("", 0) if none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return "", 0
    # the name stands in parentheses and may hold any byte, so it ends at the last one
    name, _, rest = text.rpartition(b")")
    comm = name.partition(b"(")[2].decode("utf-8", "replace")
    return comm, int(rest.split()[19])
