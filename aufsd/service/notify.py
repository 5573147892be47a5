"""sd_notify(3) without libsystemd: one datagram a message. Does nothing where nobody listens."""

import os
import socket
from collections.abc import Awaitable, Callable
from time import CLOCK_MONOTONIC, clock_gettime_ns

import trio


class Notifier:
    """Tells the service manager. `watchdog`: half the interval it expects, in seconds, or None."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        # a leading @ stands for the abstract namespace's zero byte
        self._address = "\0" + address[1:] if address.startswith("@") else address
        own = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        interval = os.environ.pop("WATCHDOG_USEC", "")
        self.watchdog = int(interval) / 2e6 if own and interval.isdigit() else None

    def tell(self, *lines: str) -> None:
        """Send assignments such as READY=1. A datagram to a socket in memory does not block."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as peer:
            peer.setblocking(False)
            try:
                peer.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                # a manager that does not listen must not stop the daemon
                return

    def reloading(self) -> None:
        """RELOADING=1 with the time that systemd 253 and later want beside it."""
        now = clock_gettime_ns(CLOCK_MONOTONIC) // 1000
        self.tell("RELOADING=1", f"MONOTONIC_USEC={now}")


async def feed_watchdog(notifier: Notifier, answers: Callable[[], Awaitable[None]]) -> None:
    """Feed the watchdog for as long as `answers` returns in time. Endless; returns at once if off.

    A daemon that cannot do its work is not fed, and the manager restarts it: mounts outlive that.
    """
    if notifier.watchdog is None:
        return
    while True:
        with trio.move_on_after(notifier.watchdog):
            await answers()
            notifier.tell("WATCHDOG=1")
        await trio.sleep(notifier.watchdog / 2)
