"""The command `aufsd`: argv in, one sentence and an exit status out.

Exit status of `serve`: 0 stopped, 2 configuration, 3 the store was refused, 4 no usable backend,
1 anything else.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Literal, cast

import structlog

from aufsd import __version__, config
from aufsd.config import ConfigError
from aufsd_client import oci, standard
from aufsd_client.errors import (
    AufsdError,
    BackendUnsupported,
    IncompatibleFilesystem,
    StoreLocked,
    StoreNotAdopted,
)

USAGE, REFUSED, NO_BACKEND = 2, 3, 4
# as a shell says it of a program that SIGINT ended
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    standard.complete()
    try:
        try:
            status = _run(argv)
        except SystemExit as left:
            # argparse has said what is wrong, or shown its help
            status = left.code if isinstance(left.code, int) else USAGE
        standard.flush()
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except ConfigError as error:
        return _say(str(error), USAGE)
    except (IncompatibleFilesystem, StoreLocked, StoreNotAdopted) as error:
        return _say(error.message, REFUSED)
    except BackendUnsupported as error:
        return _say(error.message, NO_BACKEND)
    except AufsdError as error:
        return _say(error.message, 1)
    except oci.LayoutError as error:
        return _say(str(error), 1)
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        more = "; raise LimitNOFILE= (ulimit -Hn)" if error.errno == errno.EMFILE else ""
        return _say(f"{where}{error.strerror or error}{more}", 1)
    return status


def _run(argv: Sequence[str] | None) -> int:
    flags = vars(command_line().parse_args(argv))
    run = flags.pop("run")
    status = run(flags)
    assert isinstance(status, int)
    return status


def _say(sentence: str, status: int) -> int:
    # who has closed standard error has asked not to be told
    with suppress(OSError):
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

    says = "say what this host can do, by trying it"
    probe = commands.add_parser("probe", help=says, description=f"{says}.".capitalize())
    probe.add_argument(
        "--root", metavar="DIR", help="where a store lies or would lie", default="/var/lib/aufsd"
    )
    probe.set_defaults(run=_probe)

    says = "check a store that nobody serves"
    check = commands.add_parser("check", help=says, description=f"{says}.".capitalize())
    check.add_argument("--root", metavar="DIR", required=True, help="the store")
    check.add_argument("--adopt", action="store_true", help="also one that aufsd did not make")
    check.add_argument("--deep", action="store_true", help="look into the layers too")
    check.add_argument("--repair", action="store_true", help="put right what can be")
    check.set_defaults(run=_check)

    export = commands.add_parser(
        "export",
        help="write a layer of a store that nobody serves as a tar, or layers as OCI images",
        description="Write the merged view of a layer as a tar to standard output, or layers as "
        "images into an OCI image layout. Reads the branches alone: nothing is mounted, and the "
        "kernel needs no aufs. Of a store that is served, `aufsctl export` does the same.",
    )
    export.add_argument("id", nargs="+", metavar="ID", help="the layer; several with --oci")
    export.add_argument("--root", metavar="DIR", default=argparse.SUPPRESS, help="the store")
    export.add_argument(
        "--config",
        metavar="FILE",
        help=f"the store and its id maps, from here (default: {config.DEFAULT_FILE})",
    )
    export.add_argument("--oci", metavar="DIR", help="add an image for each ID to this OCI layout")
    export.add_argument("--gzip", action="store_true", help="with --oci: compress the layers")
    export.add_argument(
        "--architecture", default="", help="with --oci: of the images (default: this machine's)"
    )
    export.set_defaults(run=_export)

    rescue = commands.add_parser(
        "rescue",
        help="list what a data root of Docker's holds, and take its images and containers out",
        description="Read Docker's data root without Docker: list its images and containers, or "
        "write them as images under their own names and ids. Nothing is written to the data root.",
    )
    _rescue_arguments(rescue)
    rescue.set_defaults(run=_rescue)
    return parser


def _rescue_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="*", metavar="IMAGE", help="a name, an id, or its beginning")
    parser.add_argument(
        "--docker-root", default="/var/lib/docker", metavar="DIR", help="Docker's data root"
    )
    parser.add_argument("--driver", default="", help="the store to read, if there are several")
    parser.add_argument("--list", action="store_true", help="say what is there; write nothing")
    parser.add_argument("--json", action="store_true", help="say it as JSON")
    parser.add_argument(
        "--container",
        action="append",
        default=[],
        metavar="NAME",
        help="also this container, as an image on its image's layers; may be given again",
    )
    parser.add_argument("--all", action="store_true", help="all images and all containers")
    parser.add_argument("--oci", metavar="DIR", help="add the images to this OCI image layout")
    parser.add_argument(
        "--docker-archive", metavar="FILE", help="write the images as `docker save` does"
    )
    parser.add_argument("--gzip", action="store_true", help="with --oci: compress the layers")
    parser.add_argument(
        "--config",
        help="the id maps of a remapped root, from here "
        f"(default: {config.DEFAULT_FILE}); only what is not an original tar needs them",
    )


def _serve(flags: dict[str, object]) -> int:
    if os.geteuid() != 0:
        return _say(
            "only root can mount: run it as root, or as root of a user namespace of your own "
            "(unshare -Urm aufsd serve ...)",
            1,
        )
    file = flags.pop("config")
    try:
        # the daemon leaves it, and reads the file again later
        base = os.getcwd()
    except FileNotFoundError:
        # which a relative path will be told
        base = None
    read = partial(config.load, None if file is None else str(file), flags, base)
    found = read()
    # the event loop and the archive rooms cost a third of a second to import: not for --help
    from aufsd import daemon

    return daemon.serve(found, read)


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
    from aufsd.archive import offline
    from aufsd.archive.requests import Settings
    from aufsd.kernel import probe
    from aufsd.store import check, opening

    root = os.path.realpath(str(flags["root"]))
    try:
        os.stat(f"{root}/layers/.")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{root}: no store lies there") from None
    namespace: Literal["trusted", "user"] = "user" if probe.in_user_namespace() else "trusted"
    store = opening.open_store(root, adopt=bool(flags["adopt"]), xattr_namespace=namespace)
    try:
        problems = check.check(store, id=None, repair=bool(flags["repair"]), mounted=None)
    finally:
        store.close()
    if flags["deep"]:
        with offline.open_offline(root, Settings(namespace=namespace)) as branches:
            problems += branches.compare(sorted(store.parent))
            problems += branches.look_into(sorted(store.parent))
    for problem in map(check.readable, problems):
        where = problem.id or "store"
        done = " (repaired)" if problem.repaired else ""
        print(f"{where}: {problem.problem}: {problem.detail}{done}")
    print(f"{len(store.parent)} layers, {len(problems)} problems")
    return 1 if any(not problem.repaired for problem in problems) else 0


def _export(flags: dict[str, object]) -> int:
    """Write layers of a store that nobody serves; warnings go to standard error."""
    ids, directory = cast("list[str]", flags["id"]), cast("str | None", flags["oci"])
    if directory is None and len(ids) > 1:
        raise ConfigError("several layers make several images: with --oci only")
    if directory is None and (flags["gzip"] or flags["architecture"]):
        raise ConfigError("--gzip and --architecture are for images: with --oci only")
    if directory is None and sys.stdout.isatty():
        raise ConfigError("a tar is not for a terminal: redirect standard output")
    file = cast("str | None", flags["config"])
    found = config.load(file, {"root": flags["root"]} if "root" in flags else {})

    from aufsd.archive import offline
    from aufsd.archive.requests import Settings
    from aufsd.kernel import probe

    settings = Settings(
        uid_maps=found.uid_maps,
        gid_maps=found.gid_maps,
        acls=found.acls,
        namespace="user" if probe.in_user_namespace() else "trusted",
    )
    with offline.open_offline(os.path.realpath(found.root), settings) as store:
        if directory is None:
            _warn(store.write_view(ids[0], sys.stdout.fileno()))
            return 0
        chains = {id: [branch.id for branch in reversed(store.chain(id))] for id in ids}
        written = oci.write(
            directory,
            chains,
            lambda id, file: _warn(store.write_layer(id, file.fileno())),
            compress=bool(flags["gzip"]),
            architecture=str(flags["architecture"]),
        )
    for name, digest in written.items():
        print(f"{name} {digest}")
    return 0


def _rescue(flags: dict[str, object]) -> int:
    from aufsd.rescue import command

    return command.run(flags)


def _warn(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        _say(f"warning: {sentence}", 0)


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    sys.exit(main())
