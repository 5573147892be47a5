"""sd_notify(3) without libsystemd: one datagram a message. Does nothing where nobody listens."""

import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from time import CLOCK_MONOTONIC, clock_gettime_ns

import trio

from aufsd.digits import number
from aufsd.tasks import Task

# at most, between two reports of the status text
_PAUSE = 10.0  # seconds


class Notifier:
    """Sends messages to the service manager. `watchdog`: its watchdog interval in seconds, or None.

    It takes its variables out of the environment, so that no child speaks for the daemon. It opens
    its socket at once and keeps it, so that it can send when no descriptor is left.
    """

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        # a leading @ means the zero byte of an abstract address
        self._address = "\0" + address[1:] if address.startswith("@") else address
        own = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        interval = os.environ.pop("WATCHDOG_USEC", "")
        microseconds = number(interval, 1 << 53) if own else None
        self.watchdog = microseconds / 1e6 if microseconds else None
        # the last state of the service, until it could be sent
        self._unsent: list[str] = []
        self._peer: socket.socket | None = None
        if self._address:
            self._peer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._peer.setblocking(False)

    @property
    def listening(self) -> bool:
        """Whether there is a manager to tell."""
        return self._peer is not None

    def tell(self, *lines: str) -> None:
        """Send assignments such as READY=1, with what could not be sent before.

        Never raises and never waits: what the manager does not take is sent with the next message.
        """
        with suppress(OSError):
            self.send(*lines)

    def send(self, *lines: str) -> None:
        """As `tell`, but raises OSError if the manager takes nothing. Does not block."""
        if self._peer is None:
            return
        states = [line for line in lines if not line.startswith(("STATUS=", "WATCHDOG="))]
        text = "\n".join((*(() if states else self._unsent), *lines))
        try:
            self._peer.sendto(text.encode("utf-8", "replace").replace(b"\0", b"?"), self._address)
        except OSError as error:
            # status and watchdog are sent again in any case
            self._unsent = states or self._unsent
            raise OSError(error.errno, error.strerror, self._address) from None
        self._unsent = []

    def reloading(self) -> None:
        """RELOADING=1 with the time that systemd 253 and later want beside it."""
        now = clock_gettime_ns(CLOCK_MONOTONIC) // 1000
        self.tell("RELOADING=1", f"MONOTONIC_USEC={now}")

    def __enter__(self) -> "Notifier":
        return self

    def __exit__(self, *_: object) -> None:
        """Close the socket; nothing is sent any more."""
        if self._peer is not None:
            self._peer.close()
            self._peer = None


async def report(
    notifier: Notifier,
    answers: Callable[[], Awaitable[None]],
    state: Callable[[], str],
    task: Task,
) -> None:
    """Report the status text, and feed the watchdog as long as `answers` returns in time.

    If the mount thread hangs, the watchdog is not fed and the manager restarts the daemon; mounts
    outlive that. Endless; returns at once without a service manager.
    """
    if notifier.listening:
        within = notifier.watchdog / 2 if notifier.watchdog else _PAUSE
        once = partial(_report_once, notifier, answers, state, within)
        await task.repeat(once, latest=min(within / 2, _PAUSE))


async def _report_once(
    notifier: Notifier,
    answers: Callable[[], Awaitable[None]],
    state: Callable[[], str],
    within: float,
) -> None:
    with trio.move_on_after(within) as waiting:
        await answers()
    try:
        if waiting.cancelled_caught:
            notifier.send(f"STATUS=the mount thread has not answered for {within:g} s; {state()}")
        else:
            notifier.send("WATCHDOG=1", f"STATUS={state()}")
    except (FileNotFoundError, ConnectionRefusedError):
        # the manager has gone after READY, which is fine unless it wants its watchdog fed
        if notifier.watchdog:
            raise
    if not waiting.cancelled_caught:
        await trio.sleep(min(within / 2, _PAUSE))
