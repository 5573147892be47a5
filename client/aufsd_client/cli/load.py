"""The verb that brings images in."""

import json
import signal
from contextlib import AbstractContextManager
from dataclasses import asdict

import click

from aufsd_client import loading
from aufsd_client.cli import progress, show
from aufsd_client.cli.ids import short
from aufsd_client.cli.session import Session


@click.command()
@click.argument("source")
@click.argument("ref", required=False, default="")
@click.option("--name", default="", metavar="ID", help="Make an empty layer of this id on top.")
@click.option(
    "--platform", default="", metavar="OS/ARCH", help="Of several, not this machine's: linux/arm64."
)
@click.pass_obj
def load(session: Session, source: str, ref: str, name: str, platform: str) -> None:
    """Load an image, or a tar of a root file system, and print its topmost layer.

    SOURCE is an OCI layout or what `docker save` wrote, a directory or a tar; skopeo copies from a
    registry to both. REF says which image, if there are several. Each layer of the image becomes a
    sealed layer; those that are there already are not made again. A broken image leaves none.
    """

    def told(id: str, size: int) -> None:
        if session.human:
            show.line(f"layer {short(id, stderr=True)}: {show.size(size)}", stderr=True)

    def watched(id: str, fd: int) -> AbstractContextManager[None]:
        return progress.of_tar(session, "apply_diff", id, fd, reads=True)

    # who reads a layer may end before it is written, which is an error here and not our end
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    with session.client() as client:
        found = loading.load(
            client, source, ref, name=name, platform=platform, told=told, watched=watched
        )
    if session.as_json:
        click.echo(json.dumps(asdict(found), ensure_ascii=False))
        return
    if not found.made:
        show.line("all of it was there already", stderr=True)
    click.echo(found.layer)


COMMANDS = (load,)
