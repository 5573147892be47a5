"""The verb that takes layers out of a store whole, for other tools."""

import json
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

import click

from aufsd_client import Client, calls, oci, results
from aufsd_client.cli import content, progress, show
from aufsd_client.cli.ids import LAYER
from aufsd_client.cli.session import Session, warn
from aufsd_client.errors import LayerHasChildren, LayerNotFound, ParentNotFound

_PREFIX = "aufsctl-export-"
_EMPTY = re.compile(_PREFIX + "[0-9a-f]{16}")
_TRIES = 20
_PAUSE = 0.1  # seconds


@click.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True, **LAYER)
@click.option("-o", "--output", metavar="FILE", help="Write to a file, not to standard output.")
@click.option("--oci", "directory", metavar="DIR", help="Add an image for each ID to this layout.")
@click.option("--gzip", is_flag=True, help="With --oci: compress the layers.")
@click.option(
    "--architecture", default="", help="With --oci: of the images, if not this machine's."
)
@click.pass_obj
def export(
    session: Session,
    ids: tuple[str, ...],
    output: str | None,
    directory: str | None,
    gzip: bool,
    architecture: str,
) -> None:
    """Write all that a layer and its parents hold, as a tar: `aufsctl export ID > root.tar`.

    With --oci, write images into an OCI image layout, with a layer for each of the parents. Nothing
    is mounted. `aufsd export` does the same for a store that nobody serves.
    """
    if directory is None and (gzip or architecture):
        raise click.UsageError("--gzip and --architecture are for images: with --oci only")
    if directory is not None and output is not None:
        raise click.UsageError("--oci names where the images go: -o is for one tar")
    if directory is not None:
        _images(session, ids, directory, compress=gzip, architecture=architecture)
        return
    if len(ids) > 1:
        raise click.UsageError("several layers make several images: with --oci only")
    with content.tar_out(output) as fd, session.client() as client:
        _remove_left_behind(client)
        found = _whole(session, client, ids[0], fd, stderr=output is None)
    if session.human:
        content.show_stream(found, stderr=output is None)


def _whole(session: Session, client: Client, id: str, fd: int, *, stderr: bool) -> results.Streamed:
    """Write what differs between a layer and nothing: all that it shows."""
    while True:
        try:
            with _nothing(client) as nothing, progress.of_tar(session, "diff", id, fd):
                return session.ask(calls.diff(id, parent=nothing), fd=fd, stderr=stderr)
        except (LayerNotFound, ParentNotFound) as error:
            # gone before it was read: another export took it for one left behind
            if nothing not in (error.data.get("id"), error.data.get("parent")):
                raise


@contextmanager
def _nothing(client: Client) -> Iterator[str]:
    """An empty layer while the block lasts."""
    id = f"{_PREFIX}{uuid.uuid4().hex[:16]}"
    client.create(id)
    try:
        yield id
    finally:
        for _ in range(_TRIES):
            # interrupted, the daemon may still be about to end the call that reads it
            if _remove(client, id):
                break
            time.sleep(_PAUSE)
        else:
            warn([f"the empty layer {id} could not be removed; the next export does it"])


def _remove_left_behind(client: Client) -> None:
    """Remove the empty layers of exports that were killed. What is being read is not removed."""
    for row in client.list(after=_PREFIX).layers:
        if _EMPTY.fullmatch(row.id) and not row.parent:
            _remove(client, row.id)


def _remove(client: Client, id: str) -> bool:
    """Remove an empty layer, unless a call reads it now; whether it is gone."""
    with suppress(LayerNotFound, LayerHasChildren):
        return client.remove(id, in_use_ok=True).reason != "in-use"
    return True


def _images(
    session: Session, ids: tuple[str, ...], directory: str, *, compress: bool, architecture: str
) -> None:
    with session.client() as client:

        def write_layer(id: str, file: IO[bytes]) -> None:
            with progress.of_tar(session, "diff", id, file.fileno()):
                found = client.diff(id, file)
            if session.human:
                warn(found.warnings)
                show.line(f"layer {id}: {show.size(found.size)}", stderr=True)

        chains = {}
        for id in ids:
            parents = client.get_metadata(id).metadata["parents"].split()
            chains[id] = [*reversed(parents), id]
        try:
            written = oci.write(
                directory, chains, write_layer, compress=compress, architecture=architecture
            )
        except oci.LayoutError as error:
            raise click.BadParameter(str(error), param_hint="--oci") from error
    if session.as_json:
        click.echo(json.dumps({"images": written}))
    else:
        for name, digest in written.items():
            click.echo(f"{name} {digest}")


COMMANDS = (export,)
