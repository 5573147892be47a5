"""What goes to PyPI: built twice, read by twine, installed into an empty virtual environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import aufsd
import aufsd_client
import aufsd_docker

CHECKOUT = Path(__file__).parents[2]
VERSION = aufsd.__version__
DISTRIBUTIONS = {"aufsd": ".", "aufsd_client": "client", "aufsd_docker": "docker"}
# 2023-11-14
EPOCH = "1700000000"


def run(*command: str, status: int = 0, cwd: Path | None = None, umask: int = -1) -> str:
    """What a program says; AssertionError if it ends otherwise."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        umask=umask,
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def python(*arguments: str, cwd: Path | None = None, umask: int = -1) -> str:
    """What this interpreter says, of its own packages alone."""
    return run(sys.executable, "-I", *arguments, cwd=cwd, umask=umask)


def build(sources: Path, directory: Path, umask: int = -1) -> Path:
    """The wheels and sdists of the three, in a directory."""
    for place in DISTRIBUTIONS.values():
        arguments = ("-m", "hatchling", "build", "-d", str(directory))
        python(*arguments, cwd=sources / place, umask=umask)
    return directory


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CHECKOUT, tmp_path_factory.mktemp("dist"))


def test_the_three_versions_are_one() -> None:
    assert aufsd_client.__version__ == aufsd_docker.__version__ == VERSION
    changelog = (CHECKOUT / "CHANGELOG.md").read_text()
    assert f"\n## [{VERSION}]" in changelog
    assert (CHECKOUT / "debian/changelog").read_text().startswith(f"aufsd ({VERSION}-")


def test_two_builds_give_the_same_bytes(built: Path, tmp_path: Path) -> None:
    # the times of files are those of the copy
    others = shutil.ignore_patterns(".git", ".venv", ".*_cache", "build", "dist", "tests")
    shutil.copytree(CHECKOUT, tmp_path / "copy", ignore=others, copy_function=shutil.copy)
    again = build(tmp_path / "copy", tmp_path / "dist", umask=0o077)
    first = {path.name: path.read_bytes() for path in built.iterdir()}
    assert sorted(first) == sorted(
        f"{name}-{VERSION}{end}"
        for name in DISTRIBUTIONS
        for end in ("-py3-none-any.whl", ".tar.gz")
    )
    assert first == {path.name: path.read_bytes() for path in again.iterdir()}


def test_pypi_takes_the_metadata(built: Path) -> None:
    python("-m", "twine", "check", "--strict", *map(str, built.iterdir()))


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of programs of a virtual environment that has nothing."""
    place = tmp_path_factory.mktemp("empty")
    python("-m", "venv", "--without-pip", str(place))
    return place / "bin"


def install(programs: Path, *what: str) -> None:
    """Install into a virtual environment, from nowhere but this disk."""
    python("-m", "pip", f"--python={programs}/python", "install", "--quiet", "--no-index", *what)


def test_the_client_alone_says_what_its_command_lacks(built: Path, empty: Path) -> None:
    # no `--no-deps`: the library has none
    install(empty, f"{built}/aufsd_client-{VERSION}-py3-none-any.whl")
    script = "import aufsd_client; print(aufsd_client.__version__)"
    assert run(f"{empty}/python", "-I", "-c", script) == f"{VERSION}\n"
    said = run(f"{empty}/aufsctl", "ping", status=1)
    assert said == "aufsctl: needs click: pip install 'aufsd-client[cli]'\n"


@pytest.fixture(scope="module")
def everything(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of programs of a virtual environment that has all, as a user gets it."""
    place = tmp_path_factory.mktemp("everything")
    python("-m", "venv", "--without-pip", str(place))
    pip = [sys.executable, "-I", "-m", "pip", f"--python={place}/bin/python", "install", "--quiet"]
    what = ("aufsd", "aufsd-client[cli]", "aufsd-docker")
    named = [f"{name}=={VERSION}" for name in what]
    done = subprocess.run(
        [*pip, "--find-links", str(built), *named],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode and "connection broken by" in done.stdout:
        pytest.skip("PyPI cannot be reached")
    assert done.returncode == 0, done.stdout
    return place / "bin"


def test_what_is_installed_from_wheels_works(everything: Path, tmp_path: Path) -> None:
    assert run(f"{everything}/aufsd", "--version") == f"aufsd {VERSION}\n"
    assert run(f"{everything}/aufsctl", "--version") == f"aufsctl, version {VERSION}\n"
    assert "usage: aufsd-docker-plugin" in run(f"{everything}/aufsd-docker-plugin", "--help")
    assert "overlay" in run(f"{everything}/aufsd", "probe", "--root", str(tmp_path))
    nobody = ("--socket", f"{tmp_path}/aufsd.sock")
    said = run(f"{everything}/aufsctl", *nobody, "ping", status=3)
    assert said.startswith(f"aufsctl: no daemon listens on {tmp_path}/aufsd.sock: start it")
    # its own side is told all the same
    said = run(f"{everything}/aufsctl", *nobody, "version", status=3)
    assert f"aufsctl   {VERSION}\n" in said
