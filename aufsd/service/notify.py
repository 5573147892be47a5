"""sd_notify(3) without libsystemd: one datagram a message. Does nothing where nobody listens."""

import os
import socket
from collections.abc import Awaitable, Callable
from time import CLOCK_MONOTONIC, clock_gettime_ns

import trio

# the status text is told anew at least so often
_PAUSE = 10.0  # seconds


class Notifier:
    """Tells the service manager. `watchdog`: the interval that it expects, in seconds, or None.

    Takes its variables out of the environment, so that no child speaks for the daemon.
    """

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        # a leading @ stands for the abstract namespace's zero byte
        self._address = "\0" + address[1:] if address.startswith("@") else address
        own = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        interval = os.environ.pop("WATCHDOG_USEC", "")
        self.watchdog = int(interval) / 1e6 if own and interval.isdigit() else None

    @property
    def listening(self) -> bool:
        """Whether there is a manager to tell."""
        return bool(self._address)

    def tell(self, *lines: str) -> None:
        """Send assignments such as READY=1. A datagram to a socket in memory does not block."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as peer:
            peer.setblocking(False)
            try:
                peer.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
            except OSError:
                # a manager that does not listen must not stop the daemon
                return

    def reloading(self) -> None:
        """RELOADING=1 with the time that systemd 253 and later want beside it."""
        now = clock_gettime_ns(CLOCK_MONOTONIC) // 1000
        self.tell("RELOADING=1", f"MONOTONIC_USEC={now}")


async def report(
    notifier: Notifier, answers: Callable[[], Awaitable[None]], state: Callable[[], str]
) -> None:
    """Keep the status text true, and feed the watchdog for as long as `answers` returns in time.

    A daemon that cannot do its work is not fed, and the manager restarts it: mounts outlive that.
    Endless; returns at once where nobody listens.
    """
    if not notifier.listening:
        return
    within = notifier.watchdog / 2 if notifier.watchdog else _PAUSE
    while True:
        with trio.move_on_after(within) as waiting:
            await answers()
        if waiting.cancelled_caught:
            notifier.tell(f"STATUS=the mount thread has not answered for {within:g} s; {state()}")
        else:
            notifier.tell("WATCHDOG=1", f"STATUS={state()}")
            await trio.sleep(min(within / 2, _PAUSE))
