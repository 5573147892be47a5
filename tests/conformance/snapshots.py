"""Layers written by hand as a union would read them, made into snapshots of one another."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from aufsd.kernel import btrfs
from aufsd.store import content
from aufsd.store.whiteouts import OPAQUE, WHITEOUT

_WHITEOUT = WHITEOUT.decode()


def stack(directories: Sequence[str], *, read_only: bool) -> None:
    """Have each of these, topmost first, be a snapshot of the next one and what it holds.

    Its whiteouts and opaque directories, aufs's, are carried out. What is one stays as it is.
    """
    below = ""
    for path in reversed(directories):
        content_of(path, below)
        below = path
    content.freeze(directories[0], read_only)


def content_of(path: str, below: str) -> None:
    if btrfs.is_subvolume(os.lstat(path), path):
        return
    recipe = f"{path}.recipe"
    os.rename(path, recipe)
    if below:
        content.snapshot(below, path)
    else:
        content.make_subvolume(path)
    _carry_out(Path(recipe), Path(path))
    subprocess.run(["cp", "--archive", f"{recipe}/.", path], check=True)
    shutil.rmtree(recipe)


def _carry_out(recipe: Path, target: Path) -> None:
    """Remove from the target what the recipe hides, and from the recipe how it said so."""
    if (recipe / OPAQUE.decode()).exists():
        (recipe / OPAQUE.decode()).unlink()
        for path in target.iterdir() if target.is_dir() else ():
            _remove(path)
    for path in list(recipe.iterdir()):
        if path.name.startswith(_WHITEOUT):
            path.unlink()
            _remove(target / path.name.removeprefix(_WHITEOUT))
        elif not path.is_dir():
            _remove(target / path.name)
        else:
            if (target / path.name).exists() and not (target / path.name).is_dir():
                _remove(target / path.name)
            _carry_out(path, target / path.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
