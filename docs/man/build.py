"""Makes the man pages, the commented sample configuration and completions: build.py DIRECTORY.

Their prose is in the *.in files beside this one. What the program itself says of its keys, options,
commands and methods is put in for the words in @, so that it is written down once.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import click
import msgspec

from aufsd import __version__, config
from aufsd.__main__ import command_line
from aufsd.config import Config
from aufsd.daemon import RELOADED
from aufsd.rpc.calls import Kind
from aufsd.rpc.methods import TABLE
from aufsd_client.cli import completion
from aufsd_client.cli.__main__ import every_verb

HERE = Path(__file__).parent
KEYS = msgspec.structs.fields(Config)
KINDS: dict[Kind, str] = {"read": "read_users", "use": "use_users", "change": "change_users"}


def roff(text: str) -> str:
    """Plain text, safe from roff."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq")
    return re.sub(r"^\.", r"\&.", escaped, flags=re.MULTILINE)


def sentence(text: str) -> str:
    """A help text as a sentence."""
    return roff(f"{text[0].upper()}{text[1:].rstrip('.')}.")


def literal(value: object) -> str:
    """A default as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(literal, value))}]"
    return str(value)


def keys() -> Iterator[str]:
    """The keys of aufsd.toml, with what they may be and are."""
    for key in KEYS:
        choices = [literal(choice) for choice in get_args(key.type) if isinstance(choice, str)]
        yield f".TP\n\\fB{roff(key.name)}\\fR = {roff(literal(key.default))}"
        yield sentence(config.HELP[key.name])
        if choices:
            yield f"One of {roff(', '.join(choices))}."
        if shown := config.example(key):
            yield f"Such as {roff(shown)}."


def key_options() -> Iterator[str]:
    """The options that the keys are."""
    for key in KEYS:
        name = key.name.replace("_", "-")
        if key.type is bool:
            yield f".TP\n.BR {roff(f'--{name}')} , {roff(f'--no-{name}')}"
        else:
            yield f'.TP\n.BI {roff(f"--{name}")} " {config.metavar(key)}"'
        repeatable = "; repeatable" if config.example(key) else ""
        yield sentence(config.HELP[key.name] + repeatable)


def offline_commands() -> Iterator[str]:
    """The commands of `aufsd` but `serve`, their arguments and options, as argparse knows them."""
    commands = next(action for action in command_line()._actions if action.choices)
    assert isinstance(commands.choices, dict)
    for name, parser in commands.choices.items():
        if name == "serve":
            continue
        actions = [action for action in parser._actions if action.dest != "help"]
        positional = [action.metavar for action in actions if not action.option_strings]
        yield f'.SS "{roff(" ".join(map(str, ["aufsd", name, *positional])))}"'
        yield sentence(parser.description or name)
        for action in actions:
            called = action.option_strings[0] if action.option_strings else str(action.metavar)
            takes = bool(action.option_strings) and action.nargs is None
            value = f' " {action.metavar or action.dest.upper()}"' if takes else ""
            yield f".TP\n.BI {roff(called)}{value}"
            yield sentence(action.help or "")


def methods() -> Iterator[str]:
    """Every method in a sentence."""
    for name, method in TABLE.items():
        mark = r" \(bu" if method.monitor else ""
        yield f'.TP\n.BR {roff(name)} " ({method.kind}){mark}"'
        yield roff(summary(method.function))


def summary(function: Callable[..., object]) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())


def kinds() -> Iterator[str]:
    """What each allow-list is about."""
    for kind, key in KINDS.items():
        names = [name for name, method in TABLE.items() if method.kind == kind]
        yield f".TP\n.I {roff(key)}\n{roff(', '.join(names))}."


def options_of(command: click.Command) -> Iterator[str]:
    """The options of a command of aufsctl."""
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            flags = ", ".join((*parameter.opts, *parameter.secondary_opts))
            takes = not (parameter.is_flag or parameter.count)
            choices = getattr(parameter.type, "choices", ())
            metavar = parameter.metavar or "|".join(choices) or (parameter.name or "").upper()
            yield f'.TP\n.BI "{roff(flags)}" " {metavar if takes else ""}"'
            yield sentence(parameter.help or "See above.")


def commands() -> Iterator[str]:
    """The commands of aufsctl, their arguments and options."""
    names: dict[click.Command, list[str]] = {}
    for name, command in sorted(every_verb().commands.items()):
        names.setdefault(command, []).append(name)
    for command, called in names.items():
        context = click.Context(command, info_name=called[0])
        pieces = command.collect_usage_pieces(context)
        usage = " ".join(pieces if len(command.params) > len(pieces) - 1 else pieces[1:])
        heading = f"{', '.join(called)} {usage}".strip()
        yield f'.SS "{roff(heading)}"'
        paragraphs = inspect.cleandoc(command.help or "").replace("\b\n", "").split("\n\n")
        yield "\n.PP\n".join(roff(paragraph) for paragraph in paragraphs)
        yield from options_of(command)


def sample() -> Iterator[str]:
    """aufsd.toml with every key at its default, in comments."""
    yield "# aufsd.toml: every key with its default; see aufsd.toml(5)."
    yield "# Sizes in bytes, times in seconds, 0 for no limit."
    for key in KEYS:
        yield f"\n# {config.HELP[key.name]}"
        choices = [choice for choice in get_args(key.type) if isinstance(choice, str)]
        if choices:
            yield f"# one of: {', '.join(choices)}"
        if shown := config.example(key):
            yield f"# such as {shown}"
        yield f"#{key.name} = {literal(key.default)}"


def build(directory: Path) -> None:
    """Write all into a directory."""
    words: dict[str, dict[str, Iterator[str]]] = {
        "aufsd.8": {"OPTIONS": key_options(), "COMMANDS": offline_commands(), "METHODS": methods()},
        "aufsd.toml.5": {"KEYS": keys(), "KINDS": kinds()},
        "aufsctl.1": {
            "DESCRIPTION": iter([roff(summary(every_verb()))]),
            "OPTIONS": options_of(every_verb()),
            "COMMANDS": commands(),
        },
    }
    reloaded = ", ".join(key.name for key in KEYS if key.name in RELOADED)
    common = {"VERSION": __version__, "FILE": config.DEFAULT_FILE, "RELOADED": roff(reloaded)}
    directory.mkdir(parents=True, exist_ok=True)
    for page, parts in words.items():
        text = (HERE / f"{page}.in").read_text()
        for word, value in (common | {word: "\n".join(of) for word, of in parts.items()}).items():
            text = text.replace(f"@{word}@", value)
        (directory / page).write_text(text)
    (directory / "aufsd.toml").write_text("\n".join(sample()) + "\n")
    for shell in completion.SHELLS:
        (directory / f"aufsctl.{shell}").write_text(completion.script(every_verb(), shell) + "\n")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
