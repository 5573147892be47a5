"""Fills the packages' directories of Python packages: private.py BUILD MACHINE.

BUILD gets `daemon`, `client` (what aufsctl needs besides the library), `library`, and `licences`
with a directory for each package. Compiled modules for each Python lie side by side: their names
tell them apart. Packages come from PyPI, or from where pip's environment variables say; their
versions are those of constraints.txt, no others.
"""

import filecmp
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PYTHONS = ("3.11", "3.12", "3.13")
# glibc 2.28 or older: what every release that has one of these Pythons has
PLATFORMS = ("manylinux2014", "manylinux_2_17", "manylinux_2_28")
# they come as sources alone
SOURCES = ("jsonrpcserver", "oslash")
HERE = Path(__file__).parent
PINS = HERE / "constraints.txt"
# what pip writes down for itself, what nobody runs, and what is for PyPy
LEFT_OUT = (
    *(
        "bin",
        "**/tests",
        "**/_tests",
        "zstandard/_cffi.*",
        "zstandard/backend_cffi.py",
        "isal/isa-l",
    ),
    *(
        f"*.dist-info/{name}"
        for name in ("RECORD", "INSTALLER", "REQUESTED", "WHEEL", "direct_url.json")
    ),
    *("*.dist-info/entry_points.txt", "*.dist-info/top_level.txt", "*.dist-info/licenses"),
    "*.dist-info/zip-safe",
)
_LICENCE = re.compile("licen[cs]e|copying|notice|authors", re.IGNORECASE)


def pip(verb: str, *arguments: str) -> None:
    """Run pip, by this interpreter; SystemExit if it fails."""
    command = (sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check")
    done = subprocess.run((*command, f"--constraint={PINS}", *arguments), check=False)
    if done.returncode:
        sys.exit(f"pip {verb} {' '.join(arguments)}: exit status {done.returncode}")


def wheels(directory: Path) -> Path:
    """Make those that nobody else makes."""
    ours = (str(HERE.parent), str(HERE.parent / "client"))
    pip("wheel", "--no-deps", f"--wheel-dir={directory}", *ours, *SOURCES)
    return directory


def installed(what: str, python: str, machine: str, made: Path, target: Path) -> Path:
    """One distribution, with what it needs, for one Python."""
    pip(
        *("install", "--root-user-action=ignore", "--no-compile", "--only-binary=:all:"),
        *("--implementation=cp", f"--python-version={python}"),
        *(f"--platform={platform}_{machine}" for platform in PLATFORMS),
        *(f"--find-links={made}", f"--target={target}", what),
    )
    return target


def named(name: str) -> str:
    """The name of a distribution as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licences(tree: Path) -> Iterator[tuple[str, Path]]:
    """The files that speak of licences, each with its package; they are left out of the tree."""
    for path in sorted(tree.rglob("*")):
        if path.is_file() and _LICENCE.match(path.name) and path.suffix != ".py":
            yield named(path.relative_to(tree).parts[0].partition("-")[0]), path


def set_licences_apart(tree: Path, into: Path) -> None:
    """Move them into a directory for each package; SystemExit if a package has none, or no pin."""
    pinned = {named(line.partition("==")[0]) for line in PINS.read_text().splitlines()}
    for package, path in licences(tree):
        if not package.startswith("aufsd"):
            (into / package).mkdir(parents=True, exist_ok=True)
            # a package may hold another's
            name = path.name if ".dist-info" in str(path) else f"{path.parent.name}-{path.name}"
            shutil.copyfile(path, into / package / name)
        path.unlink()
    for information in tree.glob("*.dist-info"):
        package = named(information.name.partition("-")[0])
        if not package.startswith("aufsd") and package not in pinned:
            sys.exit(f"{PINS} has no line for {package}")
        if not package.startswith("aufsd") and not (into / package).is_dir():
            sys.exit(f"{information.name} has no licence")


def merge(tree: Path, into: Path) -> None:
    """Put a tree into one for all Pythons; SystemExit if that has another file of the same name."""
    for pattern in LEFT_OUT:
        for path in list(tree.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    into.mkdir(exist_ok=True)
    for path in sorted(tree.rglob("*")):
        there = into / path.relative_to(tree)
        if path.is_dir():
            there.mkdir(exist_ok=True)
        elif not there.exists():
            shutil.copy2(path, there)
            # pip gives a file the mode that it had on its author's disk
            there.chmod(0o644)
        elif not filecmp.cmp(path, there, shallow=False):
            sys.exit(f"{path} differs from Python to Python")


def main(build: Path, machine: str) -> None:
    """Make all."""
    shutil.rmtree(build, ignore_errors=True)
    made = wheels(build / "wheels")
    for what, name in (("aufsd", "daemon"), ("aufsd-client[cli]", "client")):
        for python in PYTHONS:
            tree = installed(what, python, machine, made, build / f"{name}-{python}")
            set_licences_apart(tree, build / "licences" / name)
            merge(tree, build / name)
    # the library is for every Python program of the host; the daemon has a copy of its own
    library = build / "library"
    library.mkdir()
    for part in build.glob("client/aufsd_client*"):
        os.rename(part, library / part.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
