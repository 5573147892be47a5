"""One run of the command: which daemon it talks to, and how it prints."""

import json
import math
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click

from aufsd_client import link
from aufsd_client.cli import show
from aufsd_client.wire import DEFAULT_SOCKET, MONITOR_SOCKET, DaemonUnreachable

if TYPE_CHECKING:
    from aufsd_client.calls import Request
    from aufsd_client.client import Client

# What `ping` needs is all that is imported here; the rest takes half of the time of a short call.
T = TypeVar("T")


def seconds(
    _context: click.Context, parameter: click.Parameter, value: float | None
) -> float | None:
    """The callback of an option that is a number of seconds: NaN is in every range (click)."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("it has to be a number of seconds", param=parameter)
    return value


class Session(NamedTuple):
    """What the options before the verb say. `socket` "" is the usual ones."""

    socket: str
    as_json: bool
    timeout: float | None

    @property
    def human(self) -> bool:
        """Whether a person reads the output."""
        return not self.as_json

    def client(self) -> "Client":
        """A client of the control socket, or of the one that was named."""
        from aufsd_client.client import Client

        return Client(self.socket or DEFAULT_SOCKET, timeout=self.timeout)

    def ask(
        self,
        request: "Request[T]",
        *,
        monitor: bool = False,
        fd: int | None = None,
        stderr: bool = False,
    ) -> T:
        """The result, as its class; as `tell` else."""
        from aufsd_client.parsing import parse

        answer = self.tell(request.method, request.params, monitor=monitor, fd=fd, stderr=stderr)
        return parse(request.result, answer)

    def tell(
        self,
        method: str,
        params: dict[str, object],
        *,
        monitor: bool = False,
        fd: int | None = None,
        stderr: bool = False,
    ) -> dict[str, object]:
        """The result, and with --json it is printed as it came, on standard error if so told.

        `monitor`: the method is served on the monitor socket too, which is asked where this user
        may not open the control socket.
        """
        path = self.socket or DEFAULT_SOCKET
        try:
            answer = link.ask(path, method, params, fd=fd, timeout=self.timeout)
        except DaemonUnreachable as error:
            if not monitor or self.socket or not isinstance(error.__cause__, PermissionError):
                raise
            answer = link.ask(MONITOR_SOCKET, method, params, timeout=self.timeout)
        if self.as_json:
            click.echo(json.dumps(answer, ensure_ascii=False), err=stderr)
        return answer


def warn(warnings: list[str]) -> None:
    """What a result warns of."""
    for warning in warnings:
        show.line(f"warning: {warning}", style="yellow", stderr=True)


def hint(text: str) -> None:
    """What to do about what was just said."""
    show.line(f"hint: {text}", style="dim", stderr=True)
