"""aufsctl: the verbs put together, run once, and its errors told."""

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

import click

from aufsd_client import __version__, standard
from aufsd_client.blobs import ImageError
from aufsd_client.cli import content, conversion, daemon, export, layers, load, show, top
from aufsd_client.cli import run as running
from aufsd_client.cli.report import Exit, describe
from aufsd_client.cli.session import Session, hint
from aufsd_client.errors import AufsdError
from aufsd_client.sandbox import SandboxError
from aufsd_client.wire import DEFAULT_SOCKET, BadReply


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 refused, 2 usage, 3 no daemon, 4 not found, 5 busy.",
)
@click.option(
    "--socket",
    envvar="AUFSD_SOCKET",
    default="",
    metavar="PATH",
    help=f"The daemon's socket, {DEFAULT_SOCKET} if it is not named; $AUFSD_SOCKET names it too.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result object as it is.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Wait no longer for an answer.",
)
@click.version_option(__version__, prog_name="aufsctl")
@click.pass_context
def aufsctl(context: click.Context, socket: str, as_json: bool, timeout: float | None) -> None:
    """Layers and their mounts: the command line of the aufsd daemon."""
    context.obj = Session(socket, as_json, timeout)


_VERBS = (
    *layers.COMMANDS,
    *content.COMMANDS,
    *conversion.COMMANDS,
    *export.COMMANDS,
    *load.COMMANDS,
    *running.COMMANDS,
    *daemon.COMMANDS,
    top.top,
)
for command in _VERBS:
    aufsctl.add_command(command)
aufsctl.add_command(layers.get_metadata, "inspect")
aufsctl.add_command(content.apply_diff, "apply")


def run(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line; the exit status."""
    try:
        status = aufsctl.main(arguments, prog_name="aufsctl", standalone_mode=False)
        standard.flush()
    except click.ClickException as error:
        error.show()
        return Exit.USAGE
    except (KeyboardInterrupt, click.Abort):
        return 130
    except (AufsdError, BadReply, ImageError, SandboxError, OSError) as error:
        with suppress(OSError):
            # what could not be printed is not tried again at exit
            standard.flush()
        said, advice, status = describe(error)
        show.line(f"aufsctl: {said}", style="red", stderr=True)
        if advice:
            hint(advice)
    return int(status or Exit.DONE)


def main() -> None:
    """The entry point."""
    standard.complete()
    # as other commands: who reads our output and has seen enough ends us, without a word
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(run())


if __name__ == "__main__":
    main()
