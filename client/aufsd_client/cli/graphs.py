"""Verbs about the store as a whole: what stands on what, what it takes up, what can go."""

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

import click

from aufsd_client import Client
from aufsd_client.cli import show
from aufsd_client.cli.ids import LAYER, short
from aufsd_client.cli.report import Exit, describe
from aufsd_client.cli.session import Session
from aufsd_client.errors import AufsdError, LayerDamaged, LayerNotFound
from aufsd_client.graph import Graph, Wanted, drawn, graph, prunable, spaces, under
from aufsd_client.results import LayerRow, Usage

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@click.command()
@click.argument("id", default="", **LAYER)
@click.option("--no-size", is_flag=True, help="Leave the sizes out: faster with many layers.")
@click.pass_obj
def tree(session: Session, id: str, no_size: bool) -> None:
    """Draw what stands on what: all layers, or ID and those that stand on it.

    A layer that alone stands on its parent is in the parent's column.
    """
    with session.client() as client:
        found = _part(graph(client.iter_layers()), id)
        usages = {} if no_size else _usages(client, found.rows)
    if session.as_json:
        _print({"layers": [_row(found.rows[each.id], usages) for each in drawn(found)]})
        return
    now = time.time()
    rows = []
    for branch in drawn(found, ascii_only=not _unicode()):
        row = found.rows[branch.id]
        cells = [branch.rails + short(row.id)]
        cells += [] if no_size else [_size(usages, row.id)]
        cells += [str(row.references or "-"), _state(row), show.age(row.created, now)]
        rows.append(cells)
    sizes = [] if no_size else ["SIZE"]
    show.table(["LAYER", *sizes, "REFERENCES", "STATE", "AGE"], rows, empty="there are no layers")


def _part(found: Graph, id: str) -> Graph:
    if not id:
        return found
    try:
        return under(found, id)
    except KeyError:
        raise LayerNotFound(f"there is no layer {id}", id=id) from None


def _state(row: LayerRow) -> str:
    words = [word for word, so in (("mounted", row.mounted), ("sealed", row.sealed)) if so]
    return ", ".join(words) or "-"


def _unicode() -> bool:
    return (sys.stdout.encoding or "").lower().startswith("utf")


@click.command()
@click.pass_obj
def df(session: Session) -> None:
    """What each layer takes up, and what removing it gives back.

    OWN is the layer's own content, CHAIN that and its parents'. FREES is what goes when the layer
    is removed with those of its parents that nothing else stands on; "-" if layers stand on it.
    """
    with session.client() as client:
        found = graph(client.iter_layers())
        usages = _usages(client, found.rows)
    taken = spaces(found, usages)
    total = sum(each.size for each in usages.values())
    inodes = sum(each.inodes for each in usages.values())
    if session.as_json:
        layers = [_row(row, usages) | asdict(taken[id]) for id, row in found.rows.items()]
        _print({"layers": layers, "size": total, "inodes": inodes})
        return
    rows = [
        [
            short(id),
            _size(usages, id),
            show.size(each.chain),
            "-" if found.children[id] else show.size(each.frees),
            str(usages[id].inodes) if id in usages else "-",
        ]
        for id, each in sorted(taken.items(), key=lambda pair: (-pair[1].own, pair[0]))
    ]
    show.table(["LAYER", "OWN", "CHAIN", "FREES", "INODES"], rows, empty="there are no layers")
    if rows:
        counted = show.plural(len(rows), "layer")
        show.line(f"{counted}, {show.size(total)}, {show.plural(inodes, 'inode')}")


def _seconds(_: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """An age such as 90s, 30m, 24h, 7d, 2w, in seconds."""
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9})([smhdw])", value)
    if not found:
        raise click.BadParameter(
            f"{value!r} is no age such as 90s, 30m, 24h, 7d or 2w", param=parameter
        )
    return int(found[1]) * _UNITS[found[2]]


@click.command()
@click.option(
    "--older-than",
    callback=_seconds,
    metavar="AGE",
    help="Only those at least so old: 30m, 24h, 7d.",
)
@click.option("--prefix", default="", metavar="TEXT", help="Only those whose ids begin so.")
@click.option("--sealed", is_flag=True, help="Sealed ones too: images and checkpoints.")
@click.option("--parents", is_flag=True, help="Then also those on which nothing stands any more.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def prune(
    session: Session,
    older_than: int | None,
    prefix: str,
    sealed: bool,
    parents: bool,
    dry_run: bool,
    yes: bool,
) -> Exit:
    """Remove the layers that nothing stands on and nobody references.

    Sealed layers stay, unless --sealed. It shows what would go, and asks. A layer that came into
    use meanwhile stays.
    """
    asks = not (yes or dry_run)
    if asks and (session.as_json or not sys.stdin.isatty()):
        raise click.UsageError("nobody can be asked here: look with --dry-run, then say --yes")
    now = time.time()
    before = None if older_than is None else now - older_than
    with session.client() as client:
        found = graph(client.iter_layers())
        ids = prunable(found, Wanted(before, prefix, sealed, parents))
        usages = _usages(client, ids)
        if session.human:
            _show_prunable(found, ids, usages, now)
        goes = ids and not dry_run and (yes or click.confirm("Remove them?", err=True))
        removed, failed = _remove(client, ids if goes else [])
    if session.as_json:
        layers = [_row(found.rows[id], usages) for id in ids]
        kept = [{"id": id, "message": describe(error)[0]} for id, error in failed.items()]
        _print({"layers": layers, "removed": removed, "failed": kept})
    elif removed:
        size = sum(usages[id].size for id in removed if id in usages)
        show.line(f"removed {show.plural(len(removed), 'layer')}, {show.size(size)}")
    for id, error in failed.items():
        show.line(f"{id} stays: {describe(error)[0]}", style="yellow", stderr=True)
    return max((describe(error)[2] for error in failed.values()), default=Exit.DONE)


def _show_prunable(found: Graph, ids: list[str], usages: dict[str, Usage], now: float) -> None:
    rows = [[short(id), _size(usages, id), show.age(found.rows[id].created, now)] for id in ids]
    show.table(["LAYER", "SIZE", "AGE"], rows, empty="there is nothing to remove")


def _remove(client: Client, ids: Iterable[str]) -> tuple[list[str], dict[str, AufsdError]]:
    """What was removed, and what was not and why."""
    removed: list[str] = []
    failed: dict[str, AufsdError] = {}
    for id in ids:
        try:
            client.remove(id)
        except LayerNotFound:
            # somebody else has removed it
            continue
        except AufsdError as error:
            failed[id] = error
        else:
            removed.append(id)
    return removed, failed


def _usages(client: Client, ids: Iterable[str]) -> dict[str, Usage]:
    """What layers take up. Those that are gone by then, or damaged, are left out."""
    wanted = list(ids)
    found: dict[str, Usage] = {}
    with _counted(len(wanted)) as step:
        for id in wanted:
            with suppress(LayerNotFound, LayerDamaged):
                found[id] = client.usage(id)
            next(step)
    return found


@contextmanager
def _counted(total: int) -> Iterator[Iterator[int]]:
    """Steps that a person can watch, where it is a terminal and there are many of them."""
    if total < 20 or not sys.stderr.isatty():
        yield iter(range(total))
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    steps = track(range(total), "measuring layers", console=console, transient=True)
    yield iter(steps)


def _size(usages: dict[str, Usage], id: str) -> str:
    return show.size(usages[id].size) if id in usages else "-"


def _row(row: LayerRow, usages: dict[str, Usage]) -> dict[str, object]:
    return asdict(row) | (asdict(usages[row.id]) if row.id in usages else {})


def _print(value: object) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


COMMANDS = (tree, df, prune)
