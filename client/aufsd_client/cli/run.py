"""Verbs that run a command: in a throw-away layer, or beside a layer that is mounted meanwhile."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import click

from aufsd_client import Client, sandbox
from aufsd_client.cli.content import show_change
from aufsd_client.cli.ids import LAYER
from aufsd_client.cli.session import Session, hint, warn
from aufsd_client.errors import AufsdError
from aufsd_client.said import Said
from aufsd_client.sandbox import Bind, Sandbox

# how the ids of layers begin that are removed when their command ends
_THROWN: Final = "run-rm-"
_LEFT_BEHIND: Final = 60.0  # seconds


@click.command()
@click.argument("layer", **LAYER)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--rm", "throw_away", is_flag=True, help="Remove the new layer at the end.")
@click.option("--name", default="", metavar="ID", help="The new layer's id.")
@click.option("--ro", "read_only", is_flag=True, help="The root is not to be written to.")
@click.option(
    "--bind", "binds", multiple=True, metavar="SRC:DST[:ro]", help="Have SRC of the host at DST."
)
@click.option("--env", "variables", multiple=True, metavar="KEY=VALUE", help="For the command.")
@click.option("--workdir", default="/", metavar="DIR", help="Where it begins.")
@click.option("--user", default="", metavar="USER", help="A name in the layer, or UID[:GID].")
@click.option("--changes", is_flag=True, help="List what it changed, on standard error.")
@click.option("--runtime", type=click.Choice(["bwrap", "unshare"]), help="What runs it.")
@click.pass_obj
def run(
    session: Session,
    layer: str,
    command: tuple[str, ...],
    throw_away: bool,
    name: str,
    read_only: bool,
    binds: tuple[str, ...],
    variables: tuple[str, ...],
    workdir: str,
    user: str,
    changes: bool,
    runtime: str | None,
) -> int:
    """Run a command in a new layer on LAYER: `aufsctl run debian -- make test`.

    The exit status is the command's. The new layer stays, unless --rm. Its mount ends with the
    command, and both with this process, however that ends. The command has namespaces of its own
    by bubblewrap, or else by unshare, and the host's network. It is kept from the host's files by
    that and by no more: a command that runs as root has to be trusted.
    """
    environment = dict(_pair(each, "--env") for each in variables)
    wanted = tuple(_bind(each) for each in binds)
    chosen = sandbox.choose(runtime or "", user)
    id = name or (_THROWN if throw_away else "run-") + uuid.uuid4().hex[:12]
    with session.client() as client:
        _remove_left_behind(client)
        client.create(id, parent=layer)
        with _removed(client, id, throw_away or read_only), _got(client, id, read_only) as path:
            made = Sandbox(path, read_only, wanted, environment, workdir, user)
            status = sandbox.run(made, command, chosen)
            if changes:
                for change in client.iter_changes(id):
                    show_change(change, stderr=True)
        if not (throw_away or read_only or name):
            hint(f"what it wrote is in {id}; `aufsctl remove {id}` throws it away")
    return status


@click.command("with")
@click.argument("id", **LAYER)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--ro", "read_only", is_flag=True, help="Mount it read-only.")
@click.pass_obj
def with_(session: Session, id: str, command: tuple[str, ...], read_only: bool) -> int:
    """Run a command of the host while a layer is mounted: `aufsctl with work -- du -sh {}`.

    Each {} in the command is the layer's path, which $AUFSD_LAYER_PATH has too. The reference ends
    with the command, and with this process, however that ends: a script that is killed leaves none.
    The exit status is the command's.
    """
    with session.client() as client, _got(client, id, read_only) as path:
        meant = [word.replace("{}", path) for word in command]
        try:
            return sandbox.run_on_host(meant, {"AUFSD_LAYER_PATH": path})
        except FileNotFoundError:
            raise Said(f"there is no command {meant[0]}") from None


@contextmanager
def _got(client: Client, id: str, read_only: bool) -> Iterator[str]:
    """The path of a layer whose reference ends with this process, or with the block."""
    path = client.get(id, hold="process", read_only=read_only).path
    try:
        yield path
    finally:
        # what goes wrong here is no reason to hide how the command ended: the daemon puts it when
        # this process is gone
        try:
            client.put(id)
        except (AufsdError, OSError) as error:
            warn([f"{id} could not be unmounted yet: {error}"])


def _remove_left_behind(client: Client) -> None:
    """Remove the throw-away layers of runs that were killed: kill -9 leaves nobody to do it.

    A young one may be of a run that has made it and not yet got it.
    """
    for row in client.iter_layers(prefix=_THROWN):
        if not row.references and 0 < row.created < time.time() - _LEFT_BEHIND:
            # in use after all, or removed by another run
            with suppress(AufsdError):
                client.remove(row.id)


@contextmanager
def _removed(client: Client, id: str, wanted: bool) -> Iterator[None]:
    try:
        yield
    finally:
        if wanted:
            try:
                client.remove(id, force=True)
                left = ""
            except (AufsdError, OSError) as error:
                left = str(error)
            if left:
                warn([f"{id} could not be removed: {left}; `aufsctl remove {id}` does it later"])


def _pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=option)
    return key, value


def _bind(text: str) -> Bind:
    source, colon, target = text.partition(":")
    target, _, mode = target.partition(":")
    if not (source and colon and target) or mode not in ("", "ro", "rw"):
        raise click.BadParameter(f"{text!r} is not SRC:DST or SRC:DST:ro", param_hint="--bind")
    return Bind(os.path.abspath(source), target, mode == "ro")


COMMANDS = (run, with_)
