"""Which module has which verb: a run imports one of them, and not what the others use."""

from importlib import import_module
from typing import Final

import click

_PACKAGE: Final = "aufsd_client.cli"
MODULES: Final = {
    "layers": (
        *("exists", "create", "remove", "get", "put", "seal", "usage", "get-metadata", "list"),
        *("mounts", "holders"),
    ),
    "checkpoints": ("checkpoint", "rollback", "squash", "fork", "log"),
    "content": ("diff", "apply-diff", "diff-size", "changes"),
    "conversion": ("convert",),
    "export": ("export",),
    "graphs": ("tree", "df", "prune"),
    "load": ("load",),
    "run": ("run", "with"),
    "daemon": ("version", "status", "health", "metrics", "discover", "cleanup", "check"),
    "ping": ("ping",),
    "completion": ("completion",),
    "top": ("top",),
}
# another name of a verb
ALIASES: Final = {"inspect": "get-metadata", "apply": "apply-diff"}
_WHERE: Final = {verb: module for module, verbs in MODULES.items() for verb in verbs}
VERBS: Final = (*_WHERE, *ALIASES)


def find(verb: str) -> click.Command:
    """The command of a verb."""
    name = ALIASES.get(verb, verb)
    found: tuple[click.Command, ...] = import_module(f"{_PACKAGE}.{_WHERE[name]}").COMMANDS
    return next(command for command in found if command.name == name)
