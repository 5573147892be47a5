"""Root directories of other releases, made by debootstrap and kept in build/roots.

They have a systemd, and in apt's cache what the packages depend on, so that a box without a network
can install them.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[3]
ROOTS = CHECKOUT / "build/roots"
SCRIPTS = Path("/usr/share/debootstrap")
INCLUDED = ("systemd", "systemd-sysv", "dbus")


def root(suite: str, packages: Sequence[Path]) -> Path:
    """A root of a release, with what these packages need in apt's cache. Skips if there is none."""
    place = ROOTS / suite
    # what was made to the end
    if not (place / "var/cache/apt/ready").exists():
        shutil.rmtree(place, ignore_errors=True)
        ROOTS.mkdir(parents=True, exist_ok=True)
        if said := _bootstrap(suite, place) or _fill(suite, place, packages):
            pytest.skip(f"no root of {suite}: {said}")
        (place / "var/cache/apt/ready").touch()
    return place


def _bootstrap(suite: str, place: Path) -> str:
    """What went wrong."""
    with _scripts(suite) as scripts:
        return _run(
            *("debootstrap", "--variant=minbase", f"--include={','.join(INCLUDED)}"),
            # Python 3.11 of Ubuntu 22.04 is in universe. Debian has no key of Ubuntu's, and then
            # debootstrap would turn to Debian's mirror; apt in the root has the key, and checks.
            *(["--components=main,universe", "--no-check-gpg"] if _ubuntu(suite) else []),
            *(suite, str(place)),
            DEBOOTSTRAP_DIR=str(scripts),
        )


def _ubuntu(suite: str) -> bool:
    return suite in ("jammy", "noble")


@contextmanager
def _scripts(suite: str) -> Iterator[Path]:
    """debootstrap's directory; a copy with a script for a release that is younger than it."""
    if (SCRIPTS / "scripts" / suite).exists():
        yield SCRIPTS
        return
    copy = ROOTS / f"{suite}.scripts"
    shutil.copytree(SCRIPTS, copy, symlinks=True)
    try:
        # all of a distribution's are links to one
        (copy / "scripts" / suite).symlink_to("gutsy" if _ubuntu(suite) else "sid")
        yield copy
    finally:
        shutil.rmtree(copy)


def _fill(suite: str, place: Path, packages: Sequence[Path]) -> str:
    """Download what they need; what went wrong."""
    if _ubuntu(suite):
        # as Ubuntu installs itself; Python 3.11 of 22.04 is an update
        sources = place / "etc/apt/sources.list"
        lines = sources.read_text()
        sources.write_text(lines + lines.replace(f" {suite} ", f" {suite}-updates "))
    for package in packages:
        shutil.copy(package, place / "tmp")
    paths = [f"/tmp/{package.name}" for package in packages]
    install = ("apt-get", "install", "-y", "--no-install-recommends", "--download-only")
    said = (
        _run("chroot", str(place), "apt-get", "clean")
        or _run("chroot", str(place), "apt-get", "update")
        or _run("chroot", str(place), *install, *paths)
    )
    for path in paths:
        (place / path[1:]).unlink()
    return said


def _run(*command: str, **environment: str) -> str:
    """ "" or the last line of a command that failed."""
    done = subprocess.run(
        command,
        env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or [f"{command[0]} failed"]
    return lines[-1] if done.returncode else ""
