"""The shortest of the verbs, in a module that imports nothing that it does not use."""

import click

from aufsd_client.cli import show
from aufsd_client.cli.session import Session


@click.command()
@click.pass_obj
def ping(session: Session) -> None:
    """Have an answer from the daemon."""
    session.tell("ping", {}, monitor=True)
    if session.human:
        show.line("the daemon answers")


COMMANDS = (ping,)
