"""Verbs that keep what a layer holds as a layer of its own, or throw it away."""

import click

from aufsd_client import calls
from aufsd_client.cli import show
from aufsd_client.cli.ids import LAYER
from aufsd_client.cli.session import Session, warn


@click.command()
@click.argument("id", **LAYER)
@click.argument("name", metavar="AS")
@click.pass_obj
def checkpoint(session: Session, id: str, name: str) -> None:
    """Keep what a layer holds as the sealed layer AS below it; the layer goes on, in use or not."""
    found = session.ask(calls.checkpoint(id, name))
    if session.human:
        warn(found.warnings)
        show.line(f"{id} stands on {found.parent} now")


@click.command()
@click.argument("id", **LAYER)
@click.argument("to", default="", **LAYER)
@click.pass_obj
def rollback(session: Session, id: str, to: str) -> None:
    """Throw away what a layer holds of its own; with TO, put it on that layer."""
    found = session.ask(calls.rollback(id, to=to))
    if session.human:
        done = "is empty" if found.discarded else "was empty"
        show.line(f"{id} {done}" + (f", on {found.parent}" if found.parent else ""))


@click.command()
@click.argument("id")
@click.argument("onto", default="")
@click.pass_obj
def squash(session: Session, id: str, onto: str) -> None:
    """Merge the layers from ID down to ONTO, which stays, into ID; without ONTO all of them.

    ID shows the same as before, on a shorter chain. Layers in between go, unless others stand on
    them or they are in use.
    """
    found = session.ask(calls.squash(id, onto))
    if session.human:
        show.line(f"{id} stands on {onto or 'nothing'} now")
        for names, what in ((found.removed, "removed"), (found.kept, "kept")):
            if names:
                show.line(f"{what}: {' '.join(names)}")


COMMANDS = (checkpoint, rollback, squash)
