"""Whatever ends an apply_diff early: the layer is as it was, and nothing of it stays in staging.

Through the daemon: what the child alone does with such streams is in test_streams.py.
"""

import fcntl
import gzip
import os
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from aufsd.kernel import syscalls
from aufsd_client import Client, errors
from tests.archive.shelf import Entry, snapshot
from tests.archive.tars import directory, entry, link, symlink, tar
from tests.daemon import Daemon, daemon, descendants, eventually

pytestmark = pytest.mark.service

EARLIER = tar(directory("d", mode=0o2775), entry("d/kept", b"kept"), entry("over", b"before"))
LATER = tar(
    entry("over", b"after" * 200),
    entry("d/.wh..wh..opq"),
    *(entry(f"d/f{n}", b"x" * 600) for n in range(4)),
    entry("d/sub/deep", b"implied", pax_headers={"SCHILY.xattr.user.a": "b"}),
    symlink("link", "over"),
    link("hard", "over"),
    entry(".wh.gone"),
)
# up to where tarfile begins to fill up
END = len(LATER.rstrip(b"\0")) + 511 & ~511


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


CODINGS: dict[str, Callable[[bytes], bytes]] = {"plain": bytes, "gzip": gzip.compress, "zstd": zst}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon(tmp_path_factory.mktemp("served")) as made:
        yield made


@contextmanager
def unchanged(served: Daemon, client: Client) -> Iterator[str]:
    """A layer with content, which the block must leave as it is."""
    id = f"layer{len(os.listdir(served.root / 'layers'))}"
    client.create(id)
    client.apply_diff(id, EARLIER)
    before, content = look(served, id)
    yield id
    assert look(served, id) == (before, content)
    assert os.listdir(served.root / ".aufsd" / "staging") == []
    assert client.check().problems == []
    # and it can still be changed
    client.apply_diff(id, tar(entry("afterwards")))
    assert sorted(os.listdir(served.root / "diff" / id)) == ["afterwards", "d", "over"]


def look(served: Daemon, id: str) -> tuple[int, dict[bytes, Entry]]:
    path = served.root / "diff" / id
    return path.stat().st_ino, snapshot(path)


@pytest.mark.parametrize("coding", CODINGS)
def test_cut_short_at_any_byte(served: Daemon, client: Client, coding: str) -> None:
    whole = CODINGS[coding](LATER[:END] + bytes(1024))
    step = 171 if coding == "plain" else 13
    cuts = {*range(0, len(whole), step), *range(0, len(whole), 512), 1, len(whole) - 1}
    with unchanged(served, client) as id:
        for at in sorted(cuts):
            if coding == "plain" and at > END + 511:
                continue  # an archive that ends with one zero block is one
            with pytest.raises(errors.BadArchive) as caught:
                client.apply_diff(id, whole[:at])
            assert caught.value.code == 301


@pytest.mark.parametrize("coding", CODINGS)
def test_a_wrong_checksum(served: Daemon, client: Client, coding: str) -> None:
    """Of a header; of what gzip and zstd made of the whole."""
    stream = bytearray(CODINGS[coding](LATER))
    at = {"plain": LATER.index(b"d/f3"), "gzip": len(stream) - 6, "zstd": len(stream) - 2}
    stream[at[coding]] ^= 1
    with unchanged(served, client) as id, pytest.raises(errors.BadArchive) as caught:
        client.apply_diff(id, bytes(stream))
    assert caught.value.code == 301


def test_what_follows_the_end(served: Daemon, client: Client) -> None:
    with unchanged(served, client) as id:
        for coding in CODINGS.values():
            for stream in (coding(LATER) + b"garbage", coding(LATER + b"x"), coding(LATER) * 2):
                with pytest.raises(errors.BadArchive):
                    client.apply_diff(id, stream)


def test_a_killed_child(served: Daemon, client: Client) -> None:
    with unchanged(served, client) as id, sending(served, id) as caught:
        assert served.process is not None
        for pid in descendants(served.process.pid)[2:]:
            os.kill(pid, signal.SIGKILL)
    assert isinstance(caught[0], errors.InternalError)
    assert "incident" in caught[0].data


def test_a_killed_fork_server(served: Daemon, client: Client) -> None:
    with unchanged(served, client) as id, sending(served, id) as caught:
        assert served.process is not None
        os.kill(descendants(served.process.pid)[0], signal.SIGKILL)
    assert isinstance(caught[0], errors.InternalError)


@contextmanager
def sending(served: Daemon, id: str) -> Iterator[list[errors.AufsdError]]:
    """In the block a child has unpacked half of an archive; afterwards, what the call raised."""
    read, write = os.pipe()
    caught: list[errors.AufsdError] = []

    def apply() -> None:
        with served.client() as client, os.fdopen(read, "rb") as source:
            try:
                client.apply_diff(id, source)
            except errors.AufsdError as error:
                caught.append(error)

    sender = threading.Thread(target=apply)
    sender.start()
    os.write(write, LATER[: END // 2])
    eventually(lambda: unread(write) == 0)
    try:
        yield caught
        sender.join()
    finally:
        os.close(write)
        sender.join()


def unread(fd: int) -> int:
    """How many bytes of a pipe nobody has read."""
    found: tuple[int] = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))
    return found[0]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A small ext4."""
    image, ground = tmp_path / "image", tmp_path / "ground"
    ground.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-N", "256", str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(ground)], check=True)
    yield ground
    # what a killed daemon leaves behind ends a moment later
    syscalls.umount2(str(ground), syscalls.MNT_DETACH)


@pytest.mark.ext4
@pytest.mark.parametrize(
    "stream",
    [
        tar(entry("big", os.urandom(9_000_000))),
        tar(entry("first", b"y" * 100_000), *(entry(f"f{n}", b"x") for n in range(300))),
        tar(*(entry(f"f{n}", os.urandom(60_000)) for n in range(200))),
    ],
    ids=["bytes", "inodes", "many"],
)
def test_a_full_disk(tmp_path: Path, small: Path, stream: bytes) -> None:
    with (
        daemon(tmp_path, root=small / "store") as served,
        served.client() as client,
        unchanged(served, client) as id,
    ):
        with pytest.raises(errors.NoSpace) as caught:
            client.apply_diff(id, stream)
        assert caught.value.code == 305
        eventually(lambda: not os.listdir(served.root / ".aufsd" / "removing"))
