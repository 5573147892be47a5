"""A label on every inode of a new layer on btrfs, against the same create without one.

The seed's change measured a container's start, 1.942 s with and 0.918 s without; here only what
its driver did in that time. An unlabelled create is one snapshot, whatever it holds; so is one with
a label that came before. One with a new label is an xattr on each inode: there the second yardstick
is what Docker did, one name after the other.
"""

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

from aufsd.archive.relabel import XATTR
from bench.daemon import Daemon, daemon
from bench.figures import Curve, Outcome, compare
from bench.harness import Bench, Case, interleaved, seconds

SIZES = (1000, 10_000, 50_000)
LABEL = "system_u:object_r:container_file_t:s0:c123,c456"
_IMAGE = 8 << 30  # bytes, sparse
_IN_DIRECTORY = 50


def relabel(bench: Bench) -> Iterator[Outcome]:
    """Layers of each size in turn, on a btrfs of their own."""
    ground = _btrfs(bench.work)
    curves: dict[str, list[tuple[float, float]]] = {"again": [], "new": []}
    for inodes in SIZES[:2] if bench.quick else SIZES:
        with daemon(ground / str(inodes), "--backend", "btrfs", "--sync", "none") as running:
            _fill(running, bench.work / "image.tar", inodes)
            samples = interleaved(
                {
                    "again": partial(_create, running, LABEL),
                    "new": partial(_create_anew, running, count()),
                    "without a label": partial(_create, running, ""),
                    "name by name": partial(_create_and_walk, running),
                },
                bench.rounds(10),
                warm=2,
            )
        for ours, what, yardstick, goal in (
            ("again", "a label again", "without a label", 1.3),
            ("new", "a new label", "without a label", 1.3),
            ("new", "a new label", "name by name", 1.0),
        ):
            case, text = f"relabel-{ours}-{inodes}", f"create, {what}, {inodes:,} inodes, btrfs"
            yield compare(case, text, samples, yardstick, ours=ours, goal=goal)
        for ours, points in curves.items():
            points.append((inodes, median(samples[ours])))
    for ours, points in curves.items():
        yield Curve(
            panel="inodes in a labelled layer", name=f"create, {ours}", points=tuple(points)
        )


def _btrfs(work: Path) -> Path:
    if shutil.which("mkfs.btrfs") is None:
        raise RuntimeError("btrfs-progs is not installed")
    image, target = work / "btrfs.image", work / "btrfs"
    with image.open("wb") as file:
        file.truncate(_IMAGE)
    target.mkdir()
    subprocess.run(["mkfs.btrfs", "--quiet", str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(target)], check=True)
    return target


def _fill(running: Daemon, tar: Path, inodes: int) -> None:
    """A base layer that holds so many files and directories."""
    with tarfile.open(tar, "w") as archive:
        for number in range(inodes):
            directory = f"d{number // _IN_DIRECTORY}"
            entry = tarfile.TarInfo(directory)
            if number % _IN_DIRECTORY:
                entry.name = f"{directory}/{number}"
            else:
                entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
    with running.client() as client:
        client.create("image")
        client.apply_diff("image", str(tar))


def _create(running: Daemon, label: str) -> float:
    with running.client() as client:
        took = seconds(lambda: client.create("layer", parent="image", mount_label=label))
        client.remove("layer")
    # the blocks of the last one are freed by a thread of the kernel's
    os.sync()
    return took


def _create_anew(running: Daemon, numbers: "count[int]") -> float:
    """With a label that no layer has had."""
    return _create(running, f"{LABEL},c{500 + next(numbers)}")


def _create_and_walk(running: Daemon) -> float:
    """As filepath.Walk and Lsetxattr do it, in this process."""
    with running.client() as client:
        took = seconds(lambda: client.create("layer", parent="image"))
        took += seconds(lambda: _walk(str(running.root / "diff/layer")))
        client.remove("layer")
    os.sync()
    return took


def _walk(top: str) -> None:
    value = LABEL.encode()
    os.setxattr(top, XATTR, value, follow_symlinks=False)
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            os.setxattr(f"{directory}/{name}", XATTR, value, follow_symlinks=False)


CASES = (Case("relabel", relabel),)
