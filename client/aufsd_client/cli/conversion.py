"""The verb that moves layers between union file systems."""

import json
from dataclasses import asdict, dataclass, field

import click

from aufsd_client import calls
from aufsd_client.calls import Dialect
from aufsd_client.cli import show
from aufsd_client.cli.ids import LAYER
from aufsd_client.cli.report import Exit
from aufsd_client.cli.session import Session, hint
from aufsd_client.errors import LayerDamaged, LayerInUse, LayerNotFound


@click.command()
@click.argument("id", default="", **LAYER)
@click.option("--all", "every", is_flag=True, help="Every layer of the store.")
@click.option("--to", "dialect", type=click.Choice(["aufs", "overlay"]), required=True)
@click.pass_obj
def convert(session: Session, id: str, every: bool, dialect: Dialect) -> Exit:
    """Rewrite the whiteouts of a layer, or of all, for another union file system.

    With --all, a layer that is in use or damaged is named and passed over. Interrupted, the same
    command goes on where it was.
    """
    if every == bool(id):
        raise click.UsageError("name a layer, or give --all")
    if every:
        return _all(session, dialect)
    found = session.ask(calls.convert(id, dialect))
    if session.human:
        done = "converted" if found.converted else "nothing to convert"
        show.line(f"{id}: {done}")
    return Exit.DONE


@dataclass(slots=True)
class _Done:
    """What became of each layer; ids."""

    converted: list[str] = field(default_factory=list)
    unchanged: int = 0
    in_use: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def _all(session: Session, dialect: Dialect) -> Exit:
    done = _Done()
    with session.client() as client:
        ids = [row.id for row in client.iter_layers()]
        for number, id in enumerate(ids, 1):
            try:
                if client.convert(id, dialect).converted:
                    done.converted.append(id)
                    said = "converted"
                else:
                    done.unchanged += 1
                    continue
            except LayerNotFound:
                # removed since the list was made
                continue
            except LayerInUse:
                done.in_use.append(id)
                said = "in use"
            except LayerDamaged as error:
                done.damaged.append(id)
                said = error.message
            if session.human:
                failed = done.converted[-1:] != [id]
                show.line(f"{number}/{len(ids)} {id}: {said}", stderr=failed)
    if session.as_json:
        click.echo(json.dumps(asdict(done)))
    else:
        show.line(
            f"{show.plural(len(ids), 'layer')}: {len(done.converted)} converted, "
            f"{done.unchanged} were {dialect}'s already, {len(done.in_use)} in use, "
            f"{len(done.damaged)} damaged"
        )
    if done.in_use:
        hint("when nothing uses them any more, run it again: `aufsctl mounts` shows who does")
        return Exit.BUSY
    return Exit.REFUSED if done.damaged else Exit.DONE


COMMANDS = (convert,)
