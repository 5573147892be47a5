"""strace(1), attached to processes that run: counts their calls, or breaks one of them."""

import os
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

# the calls that change something that outlives the process, and those that make it last
CALLS = (
    *("rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat"),
    *("write", "pwrite64", "fsync", "syncfs", "mount", "umount2"),
    *("fchmod", "setxattr", "lsetxattr", "fsetxattr", "removexattr", "fremovexattr"),
    *("link", "linkat", "symlink", "symlinkat", "mknod", "mknodat", "ioctl"),
)
# those that need a descriptor
OPENING = ("openat", "open_tree", "socketpair", "pidfd_open")
_DETACHED_WITHIN = 10.0  # seconds
_CALL = re.compile(r"(\d+) +(\w+)\(")


class CannotTrace(Exception):
    """What strace says of it."""


@dataclass
class Trace:
    """What strace says while it runs."""

    lines: list[str] = field(default_factory=list)
    attached: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    # a process was stopped by an injected SIGSTOP
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def injected(self) -> bool:
        """Whether the fault has been made, so far."""
        return any(
            "(INJECTED)" in line or "killed by SIGKILL" in line or "stopped by SIGSTOP" in line
            for line in self.lines
        )

    def counts(self) -> dict[str, int]:
        """The most calls of each name that one process or thread made."""
        each: Counter[tuple[str, str]] = Counter()
        for line in self.lines:
            if found := _CALL.match(line):
                each[found[1], found[2]] += 1
        most: dict[str, int] = {}
        for (_, call), count in each.items():
            most[call] = max(count, most.get(call, 0))
        return most

    def read(self, pipe: int, expected: int) -> None:
        with open(pipe, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                # the child that waits for a job may be another one by now
                if line.startswith(("strace: Process", "strace: attach")):
                    expected -= 1
                    if not expected:
                        self.attached.set()
                elif "--- stopped by SIGSTOP ---" in line:
                    self.lines.append(line)
                    self.stopped.set()
                else:
                    self.lines.append(line)
        self.ended.set()


def untraceable() -> str:
    """Why no process can be traced here; "" if one can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with subprocess.Popen(["sleep", "60"]) as victim:
        try:
            with traced([victim.pid], "trace=none"):
                return ""
        except CannotTrace as error:
            return str(error)
        finally:
            victim.kill()


@contextmanager
def traced(pids: Sequence[int], *expressions: str) -> Iterator[Trace]:
    """Trace these processes, their threads and children, until the block is left.

    A child is let go when it becomes another program: the fork server of a daemon that starts.
    Each child that waits there for a job would meet the fault, and no job would ever be done.

    The first of them is the one that the others end with.

    An injection counts the calls of each thread by itself (strace(1), "when=").
    """
    trace = Trace()
    read, write = os.pipe()
    # -y: descriptors with their paths
    arguments = ["strace", "-f", "-b", "execve", "-y", "-o", f"/dev/fd/{write}"]
    for expression in expressions:
        arguments += ["-e", expression]
    for pid in pids:
        arguments += ["-p", str(pid)]
    with subprocess.Popen(arguments, stderr=write, pass_fds=[write]) as process:
        os.close(write)
        reader = threading.Thread(target=trace.read, args=(read, len(pids)))
        reader.start()
        try:
            while not trace.attached.wait(0.1):
                if trace.ended.is_set():
                    raise CannotTrace("".join(trace.lines))
            yield trace
        finally:
            # told to stop while threads of a process are dying, strace waits for them for good
            # (its detach() waits for the leader alone); it ends by itself when all have
            if _lives(pids[0]):
                process.terminate()
            try:
                process.wait(_DETACHED_WITHIN)
            except subprocess.TimeoutExpired:
                # they began to die in between; the kernel lets go of what a tracer leaves
                process.kill()
                process.wait()
            reader.join()


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
