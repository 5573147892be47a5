"""Ids on the command line: short on a terminal, known by their beginning, completed by a shell."""

import re
import sys
from typing import Any, Final, TypeVar

import click

from aufsd_client import calls, link
from aufsd_client.cli.session import Session
from aufsd_client.errors import AufsdError
from aufsd_client.parsing import parse
from aufsd_client.results import Layers
from aufsd_client.wire import DEFAULT_SOCKET

# What programs make up, and nobody wants to type: Docker's ids, those of `load`, those of `run`.
# The beginning of an id that a person chose may be that of another tomorrow: it is never enough.
_MADE: Final = re.compile(r"(?:sha256-)?[0-9a-f]{64}|run-(?:rm-)?[0-9a-f]{12}")
_BEGINNING: Final = re.compile(r"(?:sha256-)?[0-9a-f]{4,63}|run-(?:rm-)?[0-9a-f]{3,11}")
_SOON: Final = 2.0  # seconds
_LONG: Final = re.compile(r"((?:sha256-)?[0-9a-f]{12})[0-9a-f]{52}")


def short(id: str, *, stderr: bool = False) -> str:
    """An id to look at: 12 of its 64 digits on a terminal, all of them elsewhere."""
    found = _LONG.fullmatch(id)
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return found[1] if found and terminal else id


def _beginning(path: str, beginning: str, timeout: float | None) -> list[str]:
    request = calls.list_(prefix=beginning, limit=100)
    answer = link.ask(path, request.method, request.params, timeout=timeout)
    return [row.id for row in parse(Layers, answer).layers]


Given = TypeVar("Given", str, tuple[str, ...])


def _meant(context: click.Context, parameter: click.Parameter, value: Given) -> Given:
    """The whole ids. What begins none is left as it is, for the daemon to say so."""
    if isinstance(value, tuple):
        return tuple(_whole(context, parameter, each) for each in value)
    return _whole(context, parameter, value)


def _whole(context: click.Context, parameter: click.Parameter, value: str) -> str:
    session = context.find_object(Session)
    if session is None or not _BEGINNING.fullmatch(value):
        return value
    found = _beginning(session.socket or DEFAULT_SOCKET, value, session.timeout)
    if value in found:
        return value
    made = [each for each in found if _MADE.fullmatch(each)]
    if len(made) > 1:
        several = " ".join(made[:5])
        raise click.BadParameter(f"several layers begin so: {several}", context, parameter)
    return made[0] if made else value


def _completed(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The ids that begin so; none if the daemon does not answer soon."""
    path = context.find_root().params.get("socket") or DEFAULT_SOCKET
    try:
        return _beginning(path, incomplete, _SOON)
    except (AufsdError, OSError):
        return []


# of an argument or an option that names a layer, or several
LAYER: Final[dict[str, Any]] = {"callback": _meant, "shell_complete": _completed}
