"""Verbs about layers, their references and their mounts."""

import signal
from collections.abc import Iterator
from functools import partial

import click

from aufsd_client import calls, results, standard
from aufsd_client.cli import show
from aufsd_client.cli.ids import LAYER, short
from aufsd_client.cli.report import Exit
from aufsd_client.cli.session import Session, hint, warn
from aufsd_client.parsing import parse

_ids = click.argument("ids", metavar="ID...", nargs=-1, required=True, **LAYER)


@click.command()
@click.argument("id")
@click.pass_obj
def exists(session: Session, id: str) -> Exit:
    """Whether there is a layer; exit status 4 if there is none."""
    found = session.ask(calls.exists(id)).exists
    if session.human:
        show.line(show.yes(found))
    return Exit.DONE if found else Exit.NOT_FOUND


@click.command()
@click.argument("id")
@click.option("--parent", default="", metavar="ID", help="The layer that it stands on.", **LAYER)
@click.option("--mount-label", default="", metavar="LABEL", help="An SELinux context.")
@click.option("--storage-opt", multiple=True, metavar="KEY=VALUE", help="For the backend.")
@click.pass_obj
def create(
    session: Session, id: str, parent: str, mount_label: str, storage_opt: tuple[str, ...]
) -> None:
    """Make an empty layer."""
    options = dict(_split(option) for option in storage_opt)
    request = calls.create(id, parent=parent, mount_label=mount_label, storage_opt=options)
    found = session.ask(request)
    if session.human:
        warn(found.warnings)
        show.line(f"created {id}")


def _split(option: str) -> tuple[str, str]:
    key, equals, value = option.partition("=")
    if not equals:
        raise click.BadParameter(f"{option!r} is not KEY=VALUE", param_hint="--storage-opt")
    return key, value


@click.command()
@_ids
@click.option("--force", is_flag=True, help="Drop their references and unmount them first.")
@click.pass_obj
def remove(session: Session, ids: tuple[str, ...], force: bool) -> Exit:
    """Remove layers that nothing stands on and nobody references."""
    return session.each(ids, partial(_remove, force=force))


def _remove(session: Session, id: str, *, force: bool) -> Exit:
    found = session.ask(calls.remove(id, force=force))
    if found.removed:
        if session.human:
            show.line(f"removed {id}")
        return Exit.DONE
    if found.reason == "in-use":
        show.line(f"{id} is in use: {show.plural(found.references, 'reference')}", stderr=True)
        hint("`aufsctl mounts` shows by whom; --force drops them")
        return Exit.BUSY
    show.line(f"there is no layer {id}", stderr=True)
    hint("`aufsctl list` shows the layers that there are")
    return Exit.NOT_FOUND


@click.command()
@_ids
@click.option("--mount-label", default="", metavar="LABEL", help="An SELinux context.")
@click.option("--name", default="", help="Count once under this name, until it is put by name.")
@click.option("--read-only", is_flag=True, help="Mount it so that nobody can write to it.")
@click.pass_obj
def get(
    session: Session, ids: tuple[str, ...], mount_label: str, name: str, read_only: bool
) -> Exit:
    """Count a reference to a layer, mount it on the first, and print its path.

    The reference stays until `aufsctl put`; one whose path could not be printed is put back.
    """
    # a reader that is gone is an error here, and not our end
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    one = partial(_get, mount_label=mount_label, name=name, read_only=read_only)
    return session.each(ids, one)


def _get(session: Session, id: str, *, mount_label: str, name: str, read_only: bool) -> None:
    request = calls.get(id, mount_label=mount_label, name=name, read_only=read_only)
    with session.client() as client:
        answer = client.call(request.method, request.params)
        try:
            got = parse(request.result, answer)
            session.show(answer) if session.as_json else click.echo(got.path)
            standard.flush()
        except OSError as error:
            if got.new:
                client.put(id, name=name)
            raise OSError(
                f"the path could not be printed ({error.strerror}); the reference is put back"
            ) from None


@click.command()
@_ids
@click.option("--name", default="", help="The reference of this name, and no other.")
@click.pass_obj
def put(session: Session, ids: tuple[str, ...], name: str) -> Exit:
    """Drop a reference to a layer; the last one unmounts it."""
    return session.each(ids, partial(_put, name=name))


def _put(session: Session, id: str, *, name: str) -> None:
    found = session.ask(calls.put(id, name=name))
    if session.human:
        left = show.plural(found.references, "reference")
        show.line(f"{id}: {left} left, {'mounted' if found.mounted else 'not mounted'}")


@click.command()
@_ids
@click.pass_obj
def seal(session: Session, ids: tuple[str, ...]) -> Exit:
    """Write a layer's content to the disk, and let nobody change it again."""
    return session.each(ids, _seal)


def _seal(session: Session, id: str) -> None:
    found = session.ask(calls.seal(id))
    if session.human:
        show.line(f"sealed {id}: {show.size(found.size)}, {show.plural(found.inodes, 'inode')}")


@click.command()
@_ids
@click.pass_obj
def usage(session: Session, ids: tuple[str, ...]) -> Exit:
    """What a layer's own content takes up on the disk."""
    return session.each(ids, _usage)


def _usage(session: Session, id: str) -> None:
    found = session.ask(calls.usage(id))
    if session.human:
        about = f"{session.about}: " if session.about else ""
        show.line(f"{about}{show.size(found.size)}, {show.plural(found.inodes, 'inode')}")


@click.command("get-metadata")
@_ids
@click.pass_obj
def get_metadata(session: Session, ids: tuple[str, ...]) -> Exit:
    """A layer's parents and state, and where its content is. `inspect` is the same."""
    return session.each(ids, _get_metadata)


def _get_metadata(session: Session, id: str) -> None:
    found = session.ask(calls.get_metadata(id))
    if session.human:
        if session.about:
            show.line(session.about, style="bold")
        show.pairs(found.metadata.items())


@click.command("list")
@click.option("--after", metavar="ID", help="One page, beginning after this layer.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many in a page.")
@click.option("--prefix", default="", metavar="TEXT", help="Those whose ids begin so.")
@click.pass_obj
def list_(session: Session, after: str | None, limit: int | None, prefix: str) -> None:
    """The layers, by id. One page with --json, --after or --limit, else all."""
    if session.human and after is None and limit is None:
        with session.client() as client:
            _show_layers(client.iter_layers(prefix=prefix))
        return
    found = session.ask(calls.list_(after=after or "", limit=limit or 1000, prefix=prefix))
    if session.human:
        _show_layers(iter(found.layers))
        if found.next:
            hint(f"there are more: --after {found.next}")


def _show_layers(layers: Iterator[results.LayerRow]) -> None:
    rows = (
        (
            short(row.id),
            short(row.parent) or "-",
            str(row.depth),
            str(row.references),
            show.yes(row.mounted),
        )
        for row in layers
    )
    names = ["ID", "PARENT", "DEPTH", "REFERENCES", "MOUNTED"]
    show.table(names, rows, empty="there are no layers")


@click.command()
@click.pass_obj
def mounts(session: Session) -> None:
    """The layers that are referenced or mounted, and by whom."""
    found = session.ask(calls.mounts())
    if session.human:
        rows = (
            (
                short(row.id),
                row.path,
                row.backend if row.mounted else "-",
                "ro" if row.read_only else "rw",
                str(row.references),
                show.moment(row.since),
                ", ".join(f"{each.comm or '?'} ({each.pid})" for each in row.holders) or "-",
            )
            for row in found.mounts
        )
        names = ["ID", "PATH", "BACKEND", "MODE", "REFERENCES", "SINCE", "HELD BY"]
        show.table(names, rows, empty="nothing is mounted")


@click.command()
@click.argument("id", **LAYER)
@click.pass_obj
def holders(session: Session, id: str) -> None:
    """The processes that keep a layer's mount busy."""
    found = session.ask(calls.holders(id))
    if session.human:
        rows = [(str(each.pid), each.comm, _uses(each)) for each in found.holders]
        rows += [("-", "kernel", each) for each in found.kernel]
        show.table(["PID", "COMMAND", "USES"], rows, empty=f"no process uses the mount of {id}")


def _uses(holder: results.Holder) -> str:
    words = [*holder.uses, *(f"socket {path}" for path in holder.sockets)]
    if holder.hidden:
        words.append(f"perhaps: {holder.hidden} descriptors in flight or in io_uring")
    return ", ".join(words)


COMMANDS = (exists, create, remove, get, put, seal, usage, get_metadata, list_, mounts, holders)
