"""Verbs that keep what a layer holds as a layer of its own, or throw it away."""

import json
from dataclasses import asdict

import click

from aufsd_client import calls
from aufsd_client.checkpoints import LogRow
from aufsd_client.cli import show
from aufsd_client.cli.ids import LAYER, short
from aufsd_client.cli.session import Session, warn


@click.command()
@click.argument("id", **LAYER)
@click.argument("name", metavar="[AS]", default="")
@click.pass_obj
def checkpoint(session: Session, id: str, name: str) -> None:
    """Keep what a layer holds as the sealed layer AS below it; the layer goes on.

    Without AS it is called ID.1, ID.2, and so on. References and path of the layer stay. Except on
    btrfs, nobody may have a file of it open, or work in it (cd) meanwhile.
    """
    if name:
        found = session.ask(calls.checkpoint(id, name))
    else:
        with session.client() as client:
            found = client.checkpoint_next(id)
        _print(session, asdict(found))
    if session.human:
        warn(found.warnings)
        show.line(f"{id} stands on {found.parent} now")


@click.command()
@click.argument("id", **LAYER)
@click.argument("new")
@click.argument("name", metavar="[AS]", default="")
@click.pass_obj
def fork(session: Session, id: str, new: str, name: str) -> None:
    """Checkpoint a layer as AS, and create the layer NEW on that: both go on from there."""
    with session.client() as client:
        found = client.fork(id, new, name)
    _print(session, asdict(found))
    if session.human:
        warn(found.warnings)
        show.line(f"{id} and {new} stand on {found.parent} now")


@click.command()
@click.argument("id", **LAYER)
@click.pass_obj
def log(session: Session, id: str) -> None:
    """List a layer and what it stands on, newest first, with times and sizes."""
    with session.client() as client:
        found = client.log(id)
    _print(session, {"layers": [asdict(row) for row in found]})
    if session.human:
        rows = [
            (short(row.id), show.moment(row.created), show.size(row.size), _state(row))
            for row in found
        ]
        show.table(["LAYER", "CREATED", "SIZE", "STATE"], rows, empty="")


def _state(row: LogRow) -> str:
    if row.references:
        return f"in use ({row.references})"
    return "sealed" if row.sealed else "-"


def _print(session: Session, result: dict[str, object]) -> None:
    """The result object, if that is what is wanted."""
    if session.as_json:
        click.echo(json.dumps(result))


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
@click.argument("id", **LAYER)
@click.argument("onto", default="", **LAYER)
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


COMMANDS = (checkpoint, rollback, squash, fork, log)
