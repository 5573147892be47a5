"""The verb that prints what a shell needs to complete verbs, options and the ids of layers."""

from typing import Final

import click
from click.shell_completion import get_completion_class

SHELLS: Final = ("bash", "zsh", "fish")
# click makes this name of the program's
_VARIABLE: Final = "_AUFSCTL_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion of a shell: `source <(aufsctl completion bash)`."""
    click.echo(script(context.find_root().command, shell))


def script(aufsctl: click.Command, shell: str) -> str:
    """What one of SHELLS reads."""
    kind = get_completion_class(shell)
    assert kind is not None  # click has those of SHELLS
    return kind(aufsctl, {}, "aufsctl", _VARIABLE).source()


COMMANDS = (completion,)
