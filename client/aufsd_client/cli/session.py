"""One run of the command: which daemon it talks to, and how it prints."""

import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click

from aufsd_client import link
from aufsd_client.cli import show
from aufsd_client.cli.report import Exit, describe
from aufsd_client.errors import AufsdError
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
    """What the options before the verb say. `socket` "" is the usual ones.

    `about`: the id that the answer is of, where a verb was given several.
    """

    socket: str
    as_json: bool
    timeout: float | None
    about: str = ""

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
            self.show(answer, stderr=stderr)
        return answer

    def show(self, answer: dict[str, object], *, stderr: bool = False) -> None:
        """Print a result as JSON, with the id that it is of where there are several."""
        shown = {"id": self.about, **answer} if self.about else answer
        click.echo(json.dumps(shown, ensure_ascii=False), err=stderr)

    def each(self, ids: Sequence[str], verb: "Callable[[Session, str], Exit | None]") -> Exit:
        """Carry a verb out for each id. What fails for one is told, and the others are done.

        The first status that is not 0 is the status of all.
        """
        if len(ids) == 1:
            return verb(self, ids[0]) or Exit.DONE
        first = Exit.DONE
        for id in ids:
            try:
                status = verb(self._replace(about=id), id) or Exit.DONE
            except AufsdError as error:
                status = complain(error)
            first = first or status
        return first


def complain(error: Exception) -> Exit:
    """Tell an error, and what to do about it; the exit status."""
    said, advice, status = describe(error)
    show.line(f"aufsctl: {said}", style="red", stderr=True)
    if advice:
        hint(advice)
    return status


def warn(warnings: list[str]) -> None:
    """What a result warns of."""
    for warning in warnings:
        show.line(f"warning: {warning}", style="yellow", stderr=True)


def hint(text: str) -> None:
    """What to do about what was just said."""
    show.line(f"hint: {text}", style="dim", stderr=True)
