"""The process that archive jobs are forked from. It has one thread and all imports done.

    python -m aufsd.archive.forkserver FD SCRATCH

FD is a Unix socket. Each message on it carries one descriptor, the socket of a new job. It gets no
answer, because the child answers on the job's socket. Children are forked before their jobs come,
and take the jobs from the socket themselves, which saves milliseconds. When the socket is closed,
the server ends, and all children with it. The server itself never reads an archive.
"""

import contextlib
import gc
import os
import select
import signal
import socket
import sys
from contextlib import ExitStack
from typing import Final, NoReturn

from aufsd.archive import child, confine, headers, requests
from aufsd.archive.directories import erase
from aufsd.archive.fingerprint import fingerprint
from aufsd.archive.meter import Meter
from aufsd.archive.pack import Packer, pack
from aufsd.archive.reader import Reader
from aufsd.archive.requests import Branch, Settings
from aufsd.archive.sink import Sink
from aufsd.archive.source import Source
from aufsd.archive.unpack import Unpacker
from aufsd.archive.view import Layer
from aufsd.kernel import syscalls
from aufsd.store.dialect import Dialect

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


# --- warming up -------------------------------------------------------------------------------

# as often as the interpreter wants to see code before it settles on a form of it
_ROUNDS: Final = 12


def _warm_up(rounds: int = _ROUNDS) -> None:
    """Both directions once through, so often: a layer of a few entries in, and out again.

    Before a job comes. A child shares the fork server's memory until one of them writes to it, and
    each first write to a page costs microseconds. The interpreter writes into code that it runs for
    the first few times (PEP 659), and counts references everywhere; so the server does the one, and
    a child that waits for its job the other. It made a one-file layer three times as fast.

    Works below a new directory of the root; nothing is left.

    Needs a root directory that may be written to and holds little else.
    """
    request = requests.Request(requests.Convert(Dialect.AUFS), Settings())
    requests.decode_request(requests.encode(request))
    name = b"%d" % os.getpid()
    # nothing depends on it but the time that a job takes
    with contextlib.suppress(OSError):
        for _ in range(rounds):
            os.chdir("/")
            _there_and_back(name)
            os.chdir("/")
            for _ in erase(name):
                pass


def _there_and_back(name: bytes) -> None:
    with ExitStack() as opened:
        stream = os.memfd_create("archive")
        opened.callback(os.close, stream)
        os.write(stream, _archive(name))
        os.lseek(stream, 0, os.SEEK_SET)
        settings = Settings(sync="none")
        meter = Meter(lambda size, entries: None)
        reader = Reader(Source(stream, meter, digest=False), meter)
        Unpacker(reader, Dialect.AUFS, settings, meter, lambda path: False).run()
        # not the whole root: another child may be at it, and what it removes is missed here
        os.chdir(b"/" + name)
        here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        opened.callback(os.close, here)
        own = Layer(Branch("warm", Dialect.AUFS), here, settings.namespace)
        fingerprint(own, settings, meter)
        os.chdir(b"/" + name)
        pack(Packer(Sink(stream, meter, digest=False), settings, meter), own)


def _archive(name: bytes) -> bytes:
    rows = [(b"/", b"5"), (b"/d/", b"5"), (b"/d/f", b"0"), (b"/d/g", b"0"), (b"/e/h", b"0")]
    return b"".join(
        headers.encode(name + below, kind, mode=0o755, uid=0, gid=0, size=kind == b"0")
        + (b"x".ljust(512, b"\0") if kind == b"0" else b"")
        for below, kind in rows
    ) + bytes(1024)


if __name__ == "__main__":
    main()
