"""The daemon's side of the fork server: starts it when needed, and again if it has ended."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass

from aufsd_client.errors import InternalError

# tries for one job
_STARTS = 2


@dataclass(slots=True)
class ForkServer:
    """The process that children are forked from. It is started again if it has ended.

    `scratch` is any directory: the process mounts its own root there, in its own namespace. The
    process and all children inherit the descriptors `held`, which are locks. When the last process
    ends, the locks are free.
    """

    scratch: str
    held: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    channel: socket.socket | None = None

    def hand_over(self, channel: socket.socket) -> bool:
        """Have a child made that serves `channel`, which the caller closes.

        One message in a queue of many: False if that is full, and `channel` of this object is to be
        waited for. Raises InternalError if no such process stays alive.
        """
        for _ in range(_STARTS):
            self.start()
            assert self.channel is not None
            try:
                socket.send_fds(self.channel, [b"j"], [channel.fileno()])
            except BlockingIOError:
                return False
            except (BrokenPipeError, ConnectionResetError):
                self.stop()
            else:
                return True
        raise InternalError("the process that archive jobs are forked from ends at once")

    def start(self) -> None:
        """Start the process unless it runs, without waiting: a job sent early waits in line."""
        if self.process is not None and self.process.poll() is None:
            return
        self.stop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "aufsd.archive.forkserver",
                    str(theirs.fileno()),
                    self.scratch,
                ],
                pass_fds=(theirs.fileno(), *self.held),
                stdin=subprocess.DEVNULL,
                # what this process imports from, and not the directory it happens to be in
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                cwd="/",
            )
        ours.setblocking(False)
        self.channel = ours

    def stop(self) -> None:
        """End the process, and with it every child."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
