"""Verbs about the daemon and the whole store."""

import json

import click

from aufsd_client import __version__, calls
from aufsd_client.cli import progress, show
from aufsd_client.cli.ids import LAYER
from aufsd_client.cli.report import Exit
from aufsd_client.cli.session import Session


@click.command()
@click.pass_obj
def version(session: Session) -> None:
    """What the daemon is, and this command."""
    if session.human:
        # said also where no daemon answers
        show.line(f"aufsctl   {__version__}")
    found = session.ask(calls.version(), monitor=True)
    if session.human:
        show.pairs(
            [
                ("aufsd", found.version),
                ("API", str(found.api)),
                ("Backend", found.backend),
                ("Features", " ".join(found.features) or "none"),
            ]
        )


@click.command()
@click.pass_obj
def status(session: Session) -> None:
    """The state of the store."""
    found = session.ask(calls.status(), monitor=True)
    if not session.human:
        return
    rows = [("Driver", found.driver), *found.status]
    rows += [("Degraded", reason) for reason in found.degraded]
    show.pairs(rows)
    for job in found.jobs:
        done = f"{show.size(job.bytes)}, {show.plural(job.entries, 'entry')}"
        show.line(f"{job.kind} of {job.id} since {show.moment(job.since)}: {done}")


@click.command()
@click.pass_obj
def health(session: Session) -> int:
    """Whether all is well, check by check; exit status 1 if it is degraded, 2 if it is failing."""
    found = session.ask(calls.health(), monitor=True)
    if session.human:
        rows = [(check.name, check.status, check.detail) for check in found.checks]
        names = ["CHECK", "STATUS", "DETAIL"]
        show.table(names, rows, empty="nothing is checked", colours=show.HEALTH)
        show.line(f"the daemon is {found.status}", style=show.HEALTH.get(found.status, ""))
    return ("ok", "degraded", "failing").index(found.status)


@click.command()
@click.pass_obj
def metrics(session: Session) -> None:
    """Counters and gauges, as Prometheus reads them."""
    found = session.ask(calls.metrics(), monitor=True)
    if session.human:
        click.echo(found.text, nl=False)


@click.command()
@click.pass_obj
def discover(session: Session) -> None:
    """The OpenRPC document of the API, as JSON."""
    with session.client() as client:
        document = client.discover()
    click.echo(json.dumps(document, indent=None if session.as_json else 2, ensure_ascii=False))


@click.command()
@click.pass_obj
def cleanup(session: Session) -> Exit:
    """Unmount every mount of the store, whatever its count."""
    found = session.ask(calls.cleanup())
    if session.human:
        for id in found.unmounted:
            show.line(f"unmounted {id}")
        for failed in found.failed:
            holders = [f"{each.comm} ({each.pid})" for each in failed.holders]
            held = ", ".join([*holders, *failed.kernel])
            by = f", held by {held}" if held else ""
            show.line(f"{failed.id} stays mounted: {failed.errno}{by}", stderr=True)
        if not found.unmounted and not found.failed:
            show.line("nothing was mounted")
    return Exit.BUSY if found.failed else Exit.DONE


@click.command()
@click.argument("id", default="", **LAYER)
@click.option("--deep", is_flag=True, help="Read the layers' content too.")
@click.option("--repair", is_flag=True, help="Put right what can be.")
@click.pass_obj
def check(session: Session, id: str, deep: bool, repair: bool) -> None:
    """Compare the store, the daemon's table of mounts and the kernel's mounts."""
    with progress.of_work(session, f"check {id or 'every layer'}"):
        found = session.ask(calls.check(id, deep=deep, repair=repair))
    if session.human:
        rows = [
            (each.id, each.problem, each.detail, show.yes(each.repaired)) for each in found.problems
        ]
        show.table(["ID", "PROBLEM", "DETAIL", "REPAIRED"], rows, empty="no problems were found")


COMMANDS = (version, status, health, metrics, discover, cleanup, check)
