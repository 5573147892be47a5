"""aufsctl: the verbs put together, run once, and its errors told."""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

import click

from aufsd_client import __version__, link, standard
from aufsd_client.cli import verbs
from aufsd_client.cli.report import Exit
from aufsd_client.cli.session import Session, complain, seconds
from aufsd_client.errors import AufsdError
from aufsd_client.said import Said
from aufsd_client.wire import DEFAULT_SOCKET, BadReply

# set while a shell wants to know how a line may go on: click's name for it
COMPLETE = "_AUFSCTL_COMPLETE"


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
    type=click.FloatRange(min=0, min_open=True, max=link.LONGEST),
    callback=seconds,
    metavar="SECONDS",
    help="Wait no longer for an answer.",
)
@click.version_option(__version__, prog_name="aufsctl")
@click.pass_context
def aufsctl(context: click.Context, socket: str, as_json: bool, timeout: float | None) -> None:
    """Layers and their mounts: the command line of the aufsd daemon."""
    context.obj = Session(socket, as_json, timeout)


def every_verb() -> click.Group:
    """The command with all of its verbs, for whoever wants to list or explain them."""
    for verb in verbs.VERBS:
        aufsctl.add_command(verbs.find(verb), verb)
    return aufsctl


def _prepared(arguments: Sequence[str]) -> list[str]:
    """The arguments, --json before the verb wherever it stood; the verb's module is loaded."""
    if COMPLETE in os.environ:
        # the line that is being typed is not in the arguments
        _prepared_verbs(os.environ.get("COMP_WORDS", "").split()[1:])
        return list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, passed = list(arguments[:end]), arguments[end:]
    _prepared_verbs(own)
    if "--json" in own:
        own = ["--json", *(each for each in own if each != "--json")]
    return [*own, *passed]


def _prepared_verbs(words: Sequence[str]) -> None:
    """Load the verbs that are among the words, and every verb if none is."""
    # a layer may have the name of a verb
    named = {each for each in words if each in verbs.VERBS}
    if not named:
        every_verb()
    for verb in named:
        aufsctl.add_command(verbs.find(verb), verb)


def run(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line; the exit status."""
    try:
        given = _prepared(sys.argv[1:] if arguments is None else arguments)
        status = aufsctl.main(given, prog_name="aufsctl", standalone_mode=False)
        standard.flush()
    except click.ClickException as error:
        error.show()
        return Exit.USAGE
    except (KeyboardInterrupt, click.Abort):
        return 130
    except (AufsdError, BadReply, Said, OSError) as error:
        with suppress(OSError):
            # what could not be printed is not tried again at exit
            standard.flush()
        status = complain(error)
    return int(status or Exit.DONE)


def main() -> None:
    """The entry point."""
    standard.complete()
    # as other commands: who reads our output and has seen enough ends us, without a word
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(run())


if __name__ == "__main__":
    main()
