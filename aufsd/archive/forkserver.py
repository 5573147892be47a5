"""The process that archive jobs are forked from: single-threaded, lean, its imports done.

    python -m aufsd.archive.forkserver FD SCRATCH

FD is a Unix socket; each message on it carries one descriptor, the socket of a new job, and is
answered by nothing: the child speaks on the job's socket. Children are forked before their jobs
come, and take those from the socket themselves, which saves a job milliseconds. At the socket's end
the server ends, and with it every child. It is never reached by what an archive holds.
"""

import contextlib
import gc
import os
import select
import signal
import socket
import sys
from typing import Final, NoReturn

from aufsd.archive import child, confine, warming
from aufsd.kernel import syscalls

_JOB: Final = b"j"
_END: Final = b"e"
# Children that wait. While one still does, the next is not forked before a job is over, or turns
# out to be a long one: it would take the processor, and the server's pages, from who has the job.
_WAITING: Final = 2
_SHORT: Final = 20  # milliseconds
# so many in a row that did not live until a job came: the server gives up, and the jobs that wait
# for it fail, rather than fork for ever; the daemon starts another server for the next one
_LOST_MAX: Final = 3


def main() -> None:
    """Serve until the socket ends."""
    server = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(os.getppid())
    # Ctrl-C in a terminal reaches the whole group; the daemon says when it is over
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    confine.prepare(sys.argv[2])
    _warm_up()
    # nothing that lives now is garbage; without this each child would copy it all to look at it
    gc.freeze()
    first = os.fork()
    if first:
        # the namespace of processes begins with that one, and ends with it
        server.close()
        os.waitpid(first, 0)
        return
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    # children are reaped by the kernel
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    _serve(server)


def _serve(server: socket.socket) -> None:
    """Have children wait for jobs until the socket ends."""
    me = os.getpid()
    # a pipe from each child: of those that wait for a job, and of those that have one
    waiting: list[int] = []
    working: list[int] = []
    lost = 0
    while lost < _LOST_MAX:
        told = _told(waiting, working)
        over = not told
        for pipe in told:
            if pipe in working:
                over = True
                working.remove(pipe)
                os.close(pipe)
                continue
            waiting.remove(pipe)
            said = os.read(pipe, 1)
            if said == _END:
                return
            if said:
                lost = 0
                working.append(pipe)
            else:
                # killed while it waited: then there is another
                lost += 1
                os.close(pipe)
        if len(waiting) == _WAITING or (waiting and not over):
            continue
        own, theirs = os.pipe()
        if os.fork() == 0:
            for fd in (own, *waiting, *working):
                os.close(fd)
            die_with_parent(me)
            _spare(server, theirs)
        os.close(theirs)
        waiting.append(own)


def _told(waiting: list[int], working: list[int]) -> list[int]:
    """Those of the pipes that tell of a job begun or over; none once there should be another child.

    What a child with a job may write into its own is not looked at.
    """
    if not waiting:
        return []
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    for fd in working:
        poll.register(fd, 0)
    return [fd for fd, _ in poll.poll(_SHORT if len(waiting) < _WAITING else None)]


def _warm_up(*rounds: int) -> None:
    # nothing depends on it but the time that a job takes
    with contextlib.suppress(OSError):
        warming.warm_up(*rounds)


def _spare(server: socket.socket, pipe: int) -> NoReturn:
    """Wait for a job with all done that can be, and say so when it comes; the pipe ends with it."""
    confine.isolate()
    _warm_up(1)
    _, fds, _, _ = socket.recv_fds(server, 1, 1)
    os.write(pipe, _JOB if fds else _END)
    if not fds:
        os._exit(0)
    server.close()
    child.run(socket.socket(fileno=fds[0]))


def die_with_parent(parent: int) -> None:
    """Be killed when the process that started this one ends, or now if it has."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
