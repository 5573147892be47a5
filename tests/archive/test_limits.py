"""What a job may make of a layer: a full disk, limits, memory that stays flat."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
import trio
import trio.testing
import zstandard

from aufsd.archive.fork import ForkServer
from aufsd.archive.requests import Limits
from aufsd.kernel import syscalls
from aufsd_client.errors import (
    LimitExceeded,
    NoSpace,
)
from tests.archive.running import apply, begin_peak, peak, pipe, processes
from tests.archive.shelf import Shelf, needs_root, open_shelf
from tests.archive.tars import entry, link, tar

pytestmark = pytest.mark.mounts


@needs_root
@pytest.mark.parametrize("fs", ["tmpfs", pytest.param("ext4", marks=pytest.mark.ext4)])
async def test_a_full_disk_is_no_space(tmp_path: Path, server: ForkServer, fs: str) -> None:
    root = tmp_path / "store"
    root.mkdir()
    if fs == "tmpfs":
        syscalls.mount("none", str(root), "tmpfs", 0, "size=1m")
    else:
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(8 << 20)
        _run("mkfs.ext4", "-q", "-N", "64", str(image))
        _run("mount", "-o", "loop", str(image), str(root))
    try:
        async with open_shelf(root, server) as shelf:
            shelf.add("a")
            with pytest.raises(NoSpace):
                await shelf.apply(tar(entry("big", bytes(9_000_000))), "a")
            (shelf.path("a") / "big").unlink()
            if fs == "ext4":
                with pytest.raises(NoSpace):
                    await shelf.apply(tar(*(entry(f"f{n}") for n in range(100))), "a")
    finally:
        syscalls.umount2(str(root))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


async def test_bytes_and_entries_are_limited(tmp_path: Path, server: ForkServer) -> None:
    limits = Limits(bytes=1000, entries=3, depth=4)
    async with open_shelf(tmp_path, server, limits=limits) as shelf:
        fits = tar(entry("a", b"x" * 400), entry("b", b"x" * 600), entry("c"))
        shelf.add("ok")
        assert (await shelf.apply(fits, "ok")).size == 1000
        for number, stream in enumerate(
            (
                tar(entry("a", b"x" * 1001)),
                tar(entry("a", b"x" * 500), entry("b", b"x" * 501)),
                tar(*(entry(str(n)) for n in range(4))),
                tar(entry("a/b/c/d")),  # three directories that it implies
                tar(entry("a"), link("b", "a"), entry(".wh.x"), entry("y")),
                tar(entry("a/../1/2/3/4/5")),
                tar(entry("a", b"x" * 999), entry("a", b"x" * 1001)),
            )
        ):
            shelf.add(str(number))
            with pytest.raises(LimitExceeded):
                await shelf.apply(stream, str(number))


async def test_limits_count_what_the_layer_holds_in_the_end(
    tmp_path: Path, server: ForkServer
) -> None:
    async with open_shelf(tmp_path, server, limits=Limits(bytes=1000, entries=2)) as shelf:
        shelf.add("a")
        stream = tar(entry("a", b"x" * 900), entry("b", b"x" * 100))
        assert (await shelf.apply(stream, "a")).size == 1000
        # each replaces what was there
        assert (await shelf.merge(stream, "a")).size == 1000
        assert (await shelf.merge(tar(entry("a", b"y" * 800)), "a")).size == 900
        with pytest.raises(LimitExceeded):
            await shelf.merge(tar(entry("b", b"y" * 201)), "a")
        with pytest.raises(LimitExceeded):
            await shelf.merge(tar(entry("c")), "a")


async def test_a_sparse_file_counts_with_its_size(tmp_path: Path, server: ForkServer) -> None:
    async with open_shelf(tmp_path, server, limits=Limits(bytes=1 << 20)) as shelf:
        shelf.add("a")
        records = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": ""}
        with pytest.raises(LimitExceeded):
            await shelf.apply(tar(entry("x", pax_headers=records)), "a")


async def test_a_decompression_bomb_meets_the_limit_and_flat_memory(
    tmp_path: Path, server: ForkServer
) -> None:
    bomb = zstandard.ZstdCompressor().compress(tar(entry("x", bytes(300 << 20))))
    assert len(bomb) < 100_000
    async with open_shelf(tmp_path, server, limits=Limits(bytes=200 << 20)) as shelf:
        shelf.add("a")
        with pytest.raises(LimitExceeded):
            await shelf.apply(bomb, "a")


async def test_memory_stays_flat_whatever_the_size(shelf: Shelf) -> None:
    """Two gigabytes both ways; nothing of it passes through this process."""
    size = 2 << 30
    at = shelf.add("a")
    with (at / "huge").open("wb") as file:
        for offset in range(0, size, size // 8):
            os.pwrite(file.fileno(), os.urandom(1 << 20), offset)
        file.truncate(size)
    shelf.add("b")
    before = begin_peak()
    peaks: list[int] = []
    with pipe() as (r, w):
        async with trio.open_nursery() as nursery:

            async def pack() -> None:
                await shelf.jobs.diff(shelf.chain("a"), w)
                os.close(w)

            async def watch() -> None:
                while True:
                    for pid in processes(shelf.jobs.server):
                        with contextlib.suppress(OSError):
                            peaks.append(peak(pid))
                    await trio.sleep(0.02)

            nursery.start_soon(pack)
            nursery.start_soon(watch)
            result = await apply(shelf, r, "b")
            nursery.cancel_scope.cancel()
    assert result.size == size
    assert peak(os.getpid()) - before < 32 << 10
    assert shelf.jobs.server.process is not None
    assert max(peaks) - peak(shelf.jobs.server.process.pid) < 32 << 10
    assert (shelf.path("b") / "huge").stat().st_blocks * 512 < 64 << 20, "holes are holes again"
