"""The command `aufsd`: argv in, one sentence and an exit status out.

Exit status of `serve`: 0 stopped, 2 configuration, 3 the store was refused, 4 no usable backend,
1 anything else.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import structlog

from aufsd import __version__, config
from aufsd.config import ConfigError
from aufsd_client.errors import (
    AufsdError,
    BackendUnsupported,
    IncompatibleFilesystem,
    StoreLocked,
    StoreNotAdopted,
)

USAGE, REFUSED, NO_BACKEND = 2, 3, 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    parser = command_line()
    flags = vars(parser.parse_args(argv))
    run = flags.pop("run")
    try:
        status = run(flags)
        assert isinstance(status, int)
        return status
    except ConfigError as error:
        return _say(str(error), USAGE)
    except (IncompatibleFilesystem, StoreLocked, StoreNotAdopted) as error:
        return _say(error.message, REFUSED)
    except BackendUnsupported as error:
        return _say(error.message, NO_BACKEND)
    except AufsdError as error:
        return _say(error.message, 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{where}{error.strerror or error}", 1)


def _say(sentence: str, status: int) -> int:
    print(f"aufsd: {sentence}", file=sys.stderr)
    return status


def command_line() -> argparse.ArgumentParser:
    """What the command takes; docs/man/build.py reads it too."""
    parser = argparse.ArgumentParser(
        prog="aufsd", description="Layered root file systems on one host, served on a Unix socket."
    )
    parser.add_argument("--version", action="version", version=f"aufsd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the daemon", description="Run the daemon.")
    serve.add_argument("--config", help=f"the configuration file (default: {config.DEFAULT_FILE})")
    config.add_flags(serve)
    serve.set_defaults(run=_serve)

    probe = commands.add_parser("probe", help="say what this host can do, by trying it")
    probe.add_argument("--root", help="where a store lies or would lie", default="/var/lib/aufsd")
    probe.set_defaults(run=_probe)

    check = commands.add_parser("check", help="check a store that nobody serves")
    check.add_argument("--root", required=True, help="the store")
    check.add_argument("--adopt", action="store_true", help="also one that aufsd did not make")
    check.add_argument("--deep", action="store_true", help="look into the layers too")
    check.add_argument("--repair", action="store_true", help="put right what can be")
    check.set_defaults(run=_check)
    return parser


def _serve(flags: dict[str, object]) -> int:
    file = flags.pop("config")
    found = config.load(None if file is None else str(file), flags)
    # the event loop and the archive rooms cost a third of a second to import: not for --help
    from aufsd import daemon

    return daemon.serve(found, lambda: config.load(None if file is None else str(file), flags))


def _probe(flags: dict[str, object]) -> int:
    """Print what the host and the place offer; 0 if a backend can serve there."""
    from aufsd.kernel import probe
    from aufsd.store.layout import Layout
    from aufsd.union import choice

    root = _nearest_directory(str(flags["root"]))
    host = probe.host()
    print(f"kernel           {host.kernel}")
    print(f"running as       {_identity(host.root, host.user_namespace)}")
    for name, version in host.module_versions:
        print(f"{name + ' module':<16} {version}")
    print(f"SELinux          {'on' if host.selinux else 'off'}")
    ground = probe.ground(root)
    print(f"store in         {root}, on {ground.kind}")
    print(f"xattrs           {ground.xattrs or 'none'}")
    print(f"d_type           {'yes' if ground.d_type else 'no'}")
    usable = 0
    for name, found in choice.survey(Layout(root)):
        if isinstance(found, str):
            print(f"{name:<16} no: {found}")
        else:
            usable += 1
            facts = ", ".join(f"{key} {value}" for key, value in found.facts)
            print(f"{name:<16} yes; up to {found.max_branches} layers in a chain; {facts}")
    return 0 if usable else NO_BACKEND


def _identity(root: bool, user_namespace: bool) -> str:
    if not root:
        return "an ordinary user; only root can mount (or: unshare -Urm aufsd probe)"
    return "root of a user namespace" if user_namespace else "root"


def _nearest_directory(path: str) -> str:
    path = os.path.realpath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _check(flags: dict[str, object]) -> int:
    """Print what is wrong with a store; 1 if anything is left so."""
    from aufsd.kernel import probe
    from aufsd.store import check, layers

    root = os.path.realpath(str(flags["root"]))
    if not os.path.isdir(f"{root}/layers"):
        raise ConfigError(f"{root}: no store lies there")
    store = layers.open_store(
        root,
        adopt=bool(flags["adopt"]),
        xattr_namespace="user" if probe.in_user_namespace() else "trusted",
    )
    try:
        problems = check.check(
            store, id=None, deep=bool(flags["deep"]), repair=bool(flags["repair"]), mounted=None
        )
    finally:
        store.close()
    for problem in problems:
        where = problem.id or "store"
        done = " (repaired)" if problem.repaired else ""
        print(f"{where}: {problem.problem}: {problem.detail}{done}")
    print(f"{len(store.parent)} layers, {len(problems)} problems")
    return 1 if any(not problem.repaired for problem in problems) else 0


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    sys.exit(main())
