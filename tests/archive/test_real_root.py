"""A root file system as it is: unpacked as GNU tar unpacks it, packed so that every reader agrees.

AUFSD_DEBIAN_ROOT names one that debootstrap made; without it, that of `make demo` is taken.
Where that never ran, a few directories of this host stand in.
"""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from aufsd.store.dialect import Dialect
from demo.demo import CACHE
from tests.archive.shelf import Shelf, needs_root, snapshot

pytestmark = [pytest.mark.mounts, needs_root]


def packed() -> bytes:
    root = os.environ.get("AUFSD_DEBIAN_ROOT")
    if root is None and CACHE.exists():
        return CACHE.read_bytes()
    names = ["."] if root else ["etc", "usr/share/zoneinfo", "usr/share/doc/bash", "bin", "lib64"]
    # what changes while it is read, and sockets, are left to other tests
    command = ["tar", "-C", root or "/", "--sort=name", "--format=gnu", "--sparse", "-cf", "-"]
    there = [name for name in names if os.path.lexists(f"{root or ''}/{name}")]
    return subprocess.run([*command, *there], capture_output=True, check=True).stdout


def listed_by(command: list[str], stream: bytes) -> list[bytes]:
    run = subprocess.run(
        [*command, "-tf", "-"], input=stream, capture_output=True, env={"LC_ALL": "C.UTF-8"}
    )
    assert (run.returncode, run.stderr) == (0, b"")
    return [line.rstrip(b"/") for line in run.stdout.splitlines()]


@pytest.mark.bsdtar
async def test_bsdtar_lists_a_root_file_system_as_gnu_tar_does(shelf: Shelf) -> None:
    shelf.add("a")
    await shelf.apply(packed(), "a")
    out = await shelf.diff("a")
    assert listed_by(["bsdtar"], out) == listed_by(["tar", "--quoting-style=literal"], out)


async def test_a_root_file_system_in_and_out(shelf: Shelf, tmp_path: Path) -> None:
    stream = packed()
    ours = shelf.add("a")
    applied = await shelf.apply(stream, "a")
    assert applied.warnings == []
    theirs = tmp_path / "gnu"
    theirs.mkdir()
    subprocess.run(["tar", "-C", theirs, "--numeric-owner", "-xpf", "-"], input=stream, check=True)
    os.utime(theirs, ns=(0, ours.stat().st_mtime_ns))
    mine, other = snapshot(ours), snapshot(theirs)
    implied = {name for name in mine if mine[name].mtime != other[name].mtime}
    # directories that no entry names have the time of day with GNU tar
    assert implied <= {b".", b"usr", b"usr/share", b"usr/share/doc"}
    assert {n: e for n, e in mine.items() if n not in implied} == {
        n: e for n, e in other.items() if n not in implied
    }
    out = await shelf.diff("a")
    with tarfile.open(fileobj=io.BytesIO(out), errors="surrogateescape") as archive:
        members = archive.getmembers()
    names = [os.fsencode(m.name) for m in members]
    assert len(names) == len(set(names)) == len(mine)
    assert names[0] == b"."
    assert names == sorted(names, key=lambda name: [] if name == b"." else name.split(b"/"))
    assert listed_by(["tar", "--quoting-style=literal"], out) == names
    shelf.add("b", Dialect.OVERLAY)
    await shelf.apply(out, "b")
    assert await shelf.diff("b") == out
    assert await shelf.jobs.changes(shelf.chain("a"), against=shelf.chain("b")) == (
        await shelf.jobs.changes(shelf.chain("a"), against=shelf.chain("a"))
    )
