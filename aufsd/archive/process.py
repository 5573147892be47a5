"""The daemon's side of one archive process: its request, its replies, its end."""

import array
import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from aufsd.archive import requests
from aufsd.archive.patience import timed_out
from aufsd.archive.stuck import is_exiting, waits_for
from aufsd_client.errors import InternalError, from_wire

_LINE: Final = 1 << 16
# a page of changes is four megabytes of paths, and one more path, which may be long
_REPLY_MAX: Final = 64 << 20
# looks within the time that a stream has
_LOOKS: Final = 20
# what a process that was killed takes to end, but for one that waits for a disk
_DYING: Final = 1.0  # seconds


@dataclass(slots=True)
class Running:
    """A running job, and its last reported progress."""

    id: str
    kind: str
    since: float
    bytes: int = 0
    entries: int = 0
    # 0 until the child said its first line
    pid: int = 0


@dataclass(slots=True)
class ArchiveProcess:
    """The daemon's end of a job's socket."""

    job: Running
    stream: trio.socket.SocketType
    # what /proc calls its stream, if that is neither a pipe nor a socket, else ""
    file: str = ""
    # names the child for good; it comes with the first line
    pidfd: int = -1
    held: bytearray = field(default_factory=bytearray)
    # how much of that was looked through for the end of a line
    seen: int = 0

    async def send(self, line: bytes, fds: Sequence[int]) -> None:
        """Send the request."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        try:
            sent = await self.stream.sendmsg([line], ancillary)
            while sent < len(line):
                sent += await self.stream.send(line[sent:])
        except (BrokenPipeError, ConnectionResetError):
            raise _never_began(self.job) from None

    async def kill(self) -> bool:
        """Kill the child, and wait until it is gone; False if it waits for its stream for ever."""
        while self.pidfd < 0 and await self._receive():
            pass
        if self.pidfd < 0:
            return True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        while True:
            with trio.move_on_after(_DYING):
                await trio.lowlevel.wait_readable(self.pidfd)
                return True
            pid = self.job.pid
            if self.file and (waits_for(pid, self.file) or is_exiting(pid)):
                return False

    def close(self) -> None:
        """Let go of the child."""
        if self.pidfd >= 0:
            os.close(self.pidfd)

    async def result_in_time(self, seconds: float) -> requests.Result:
        """As `result`; StreamBroken once it has waited so long in one call for its stream.

        A child ends by itself when the time is over (patience.py), unless its stream is a file
        whose server does not answer: no signal interrupts that.
        """
        if not (seconds and self.file):
            return await self.result()
        moved, since = -1, trio.current_time()
        while True:
            with trio.move_on_after(seconds / _LOOKS):
                return await self.result()
            if self.job.bytes != moved:
                moved, since = self.job.bytes, trio.current_time()
            elif trio.current_time() - since >= seconds and waits_for(self.job.pid, self.file):
                raise timed_out(seconds)

    async def result(self) -> requests.Result:
        """What the child results. Raises what it raised, and InternalError if it was killed."""
        while True:
            while (end := self.held.find(b"\n", self.seen)) < 0:
                self.seen = len(self.held)
                if not await self._receive():
                    raise _died(self.job) if self.pidfd >= 0 else _never_began(self.job)
            line = bytes(self.held[:end])
            del self.held[: end + 1]
            self.seen = 0
            reply: requests.Reply = requests.decode_reply(line)
            if isinstance(reply, requests.Progress):
                self.job.bytes, self.job.entries = reply.bytes, reply.entries
            elif isinstance(reply, requests.Failed):
                raise from_wire(reply.error)
            elif not isinstance(reply, requests.Started):
                return reply

    async def _receive(self) -> bool:
        """Read more of the replies; False if no more can come.

        Only the first line brings a descriptor. It is sent before the child has seen anything of a
        stranger's; what came later might name another process, and the kernel discards it here.
        """
        room = socket.CMSG_SPACE(array.array("i").itemsize) if self.pidfd < 0 else 0
        try:
            data, ancillary, _, _ = await self.stream.recvmsg(_LINE, room, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return False
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self.pidfd = array.array("i", payload)[0]
                self.job.pid = _pid_of(self.pidfd)
        self.held += data
        if len(self.held) > _REPLY_MAX:
            raise InternalError(f"the process of this {self.job.kind} does not stop talking")
        return bool(data)


def _pid_of(pidfd: int) -> int:
    """The pid, as /proc shows it to us (proc_pid_fdinfo(5)). Reading this does not block."""
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("Pid:")), 0)


class NeverBegan(InternalError):
    """The child was gone before it had the whole request: nothing was done."""


def _never_began(job: Running) -> NeverBegan:
    return NeverBegan(f"the process of this {job.kind} was killed before it began", id=job.id)


def _died(job: Running) -> InternalError:
    # the kernel's log names the pid if it was the memory that ran out
    return InternalError(f"process {job.pid} of this {job.kind} was killed", id=job.id)
