"""Verbs about what is in a layer."""

import os
from contextlib import AbstractContextManager, nullcontext

import click

from aufsd_client import calls, results, streams
from aufsd_client.cli import progress, show
from aufsd_client.cli.ids import LAYER
from aufsd_client.cli.session import Session, hint, warn

_LETTERS = {"add": "A", "modify": "M", "delete": "D"}

_parent = click.option(
    "--parent",
    **LAYER,
    default="",
    metavar="ID",
    help="Compare with this layer, not with its own parent.",
)
_digest = click.option("--digest", is_flag=True, help="Have the stream's sha256 computed.")


@click.command()
@click.argument("id", **LAYER)
@click.option("-o", "--output", metavar="FILE", help="Write to a file, not to standard output.")
@_parent
@_digest
@click.pass_obj
def diff(session: Session, id: str, output: str | None, parent: str, digest: bool) -> None:
    """Write what a layer changed, as a tar: `aufsctl diff ID > layer.tar`.

    The result goes to standard error where the tar goes to standard output.
    """
    request = calls.diff(id, parent=parent, digest=digest)
    with tar_out(output) as fd, progress.of_tar(session, "diff", id, fd):
        found = session.ask(request, fd=fd, stderr=output is None)
    if session.human:
        show_stream(found, stderr=output is None)


def tar_out(path: str | None) -> AbstractContextManager[int]:
    """The descriptor that a tar goes to: of the file at `path`, or standard output."""
    if path is not None:
        return streams.sink(path)
    if os.isatty(1):
        raise click.UsageError("a tar is not for a terminal: redirect it, or name a file with -o")
    return nullcontext(1)


@click.command("apply-diff")
@click.argument("id", **LAYER)
@click.option("-i", "--input", "source", metavar="FILE", help="Read a file, not standard input.")
@_parent
@_digest
@click.pass_obj
def apply_diff(session: Session, id: str, source: str | None, parent: str, digest: bool) -> None:
    """Unpack a tar into a layer: `aufsctl apply-diff ID < layer.tar`. `apply` is the same."""
    request = calls.apply_diff(id, parent=parent, digest=digest)
    with _input(source) as fd, progress.of_tar(session, "apply_diff", id, fd, reads=True):
        found = session.ask(request, fd=fd)
    if session.human:
        show_stream(found)


def _input(path: str | None) -> AbstractContextManager[int]:
    if path is not None:
        return streams.source(path)
    if os.isatty(0):
        raise click.UsageError("no tar comes from a terminal: redirect one, or name a file with -i")
    return nullcontext(0)


def show_stream(found: results.Streamed, *, stderr: bool = False) -> None:
    """What there is to say of a tar that was moved."""
    warn(found.warnings)
    digest = f", {found.digest}" if found.digest else ""
    if found.diff_id != found.digest:
        digest += f", uncompressed {found.diff_id}"
    entries = show.plural(found.entries, "entry")
    show.line(f"{entries}, {show.size(found.size)}{digest}", stderr=stderr)


@click.command("diff-size")
@click.argument("id", **LAYER)
@_parent
@click.pass_obj
def diff_size(session: Session, id: str, parent: str) -> None:
    """Bytes of the regular files in a layer's own content."""
    found = session.ask(calls.diff_size(id, parent=parent))
    if session.human:
        show.line(f"{found.size} bytes ({show.size(found.size)})")


@click.command()
@click.argument("id", **LAYER)
@_parent
@click.option("--after", metavar="CURSOR", help="One page, beginning after this.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many in a page.")
@click.pass_obj
def changes(session: Session, id: str, parent: str, after: str | None, limit: int | None) -> None:
    """What a layer changed: A added, M modified, D deleted.

    One page with --json, --after or --limit, else all.
    """
    if session.human and after is None and limit is None:
        with session.client() as client:
            any_change = False
            for change in client.iter_changes(id, parent=parent):
                any_change = True
                show_change(change)
        if not any_change:
            show.line(f"{id} changed nothing", stderr=True)
        return
    request = calls.changes(id, parent=parent, after=after or "", limit=limit or 10_000)
    found = session.ask(request)
    if session.human:
        for change in found.changes:
            show_change(change)
        if found.next:
            hint(f"there are more: --after {found.next}")


def show_change(change: results.Change, *, stderr: bool = False) -> None:
    """One line: A added, M modified, D deleted."""
    click.echo(f"{_LETTERS.get(change.kind, '?')} {show.text(change.path)}", err=stderr)


COMMANDS = (diff, apply_diff, diff_size, changes)
