"""Daemons without the wait: forked from a process that has imported everything already.

    python -m tests.crash.zygote

Each line on standard input is an order as JSON; it is answered with the pid of a new daemon. At the
end of the input all of them end.
"""

import json
import os
import signal
import sys
from typing import NoReturn, TypedDict

from aufsd import __main__ as command
from aufsd import daemon as everything
from aufsd.kernel import syscalls

assert everything


class Order(TypedDict):
    """`gate`: a FIFO to wait at before the first step, so that a tracer can be attached; or ""."""

    argv: list[str]
    log: str
    notify: str
    gate: str


def main() -> None:
    """Serve until the input ends."""
    # the kernel reaps; whoever gave the order has a pidfd
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        order: Order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(order)
        print(pid, flush=True)


def _become(order: Order) -> NoReturn:
    status = 70
    try:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.environ["NOTIFY_SOCKET"] = order["notify"]
        if order["gate"]:
            os.close(os.open(order["gate"], os.O_RDONLY))
        status = command.main(order["argv"])
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
