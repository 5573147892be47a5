"""What may be wrong with a stream, and what may not: its end, its compression, its descriptor."""

import contextlib
import gzip
import hashlib
import io
import os
import random
import select
import socket
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from aufsd.archive.headers import Member
from aufsd.archive.meter import Meter
from aufsd.archive.reader import Reader
from aufsd.archive.source import Source
from aufsd_client.errors import BadArchive, StreamBroken
from tests.archive.shelf import Shelf
from tests.archive.tars import directory, entry, link, symlink, tar

ARCHIVE = tar(
    directory("d"),
    entry("d/small", b"s" * 700),
    entry("d/" + "long" * 60, b"x"),
    link("d/link", "d/small"),
    symlink("d/symlink", "small"),
    entry("large", bytes(range(256)) * 300, pax_headers={"SCHILY.xattr.user.a": "b"}),
    entry("last", b""),
)
# what tarfile fills up to is not part of it
CONTENT = ARCHIVE.rstrip(b"\0")
CONTENT += bytes(-len(CONTENT) % 512)


@contextlib.contextmanager
def opened(stream: bytes) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.write(stream)
        file.seek(0)
        yield file.fileno()


def read(stream: bytes) -> tuple[list[Member], list[str]]:
    """Every member of a stream, its body passed over, and the warnings."""
    meter = Meter(lambda size, entries: None)
    with opened(stream) as fd:
        members = list(Reader(Source(fd, meter, digest=False), meter).members())
    return members, meter.warnings()


def gz(data: bytes) -> bytes:
    # no time in it: it would be in the names of tests, which have to be the same in every process
    return gzip.compress(data, 6, mtime=0)


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def zst_streamed(data: bytes) -> bytes:
    """A frame that does not say its size, of many blocks."""
    out = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(out, closefd=False) as writer:
        for at in range(0, len(data), 1000):
            writer.write(data[at : at + 1000])
            writer.flush()
    return out.getvalue()


PLAIN: Callable[[bytes], bytes] = bytes
CODINGS = {"plain": PLAIN, "gzip": gz, "zstd": zst, "zstd-streamed": zst_streamed}


@pytest.mark.parametrize("coding", CODINGS)
def test_every_coding_is_told_by_its_first_bytes(coding: str) -> None:
    members, warnings = read(CODINGS[coding](ARCHIVE))
    assert [m.name for m in members][-1] == b"last"
    assert len(members) == 7
    assert warnings == []


@pytest.mark.parametrize("coding", CODINGS)
def test_cut_short_at_any_byte_is_noticed(coding: str) -> None:
    """Past the first block of the end marker it is a warning, and past the second nothing."""
    whole = CODINGS[coding](CONTENT + bytes(1024))
    step = 1 if len(whole) < 2000 else 97
    ends = {*range(0, len(whole), step), *range(0, len(whole), 512), len(whole) - 1}
    end = len(CONTENT)
    for at in sorted(ends):
        if coding == "plain" and at >= end + 512:
            assert len(read(whole[:at])[1]) == 1, at
        else:
            with pytest.raises(BadArchive):
                read(whole[:at])


def test_one_block_at_the_end_is_a_warning() -> None:
    assert read(CONTENT + bytes(512))[1] == ["the archive ends with one zero block instead of two"]
    assert read(CONTENT + bytes(10240))[1] == []


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        CONTENT,
        CONTENT + bytes(511),
        CONTENT + bytes(512) + b"x",
        CONTENT + bytes(512) + CONTENT,
        ARCHIVE + b"x",
        ARCHIVE + ARCHIVE,
        ARCHIVE + bytes(100_000) + b"\n",
        b"x",
        b"x" * 10240,
        gz(b""),
        gz(b"x" * 512),
        gz(ARCHIVE) + b"garbage",
        gz(ARCHIVE) + bytes(512) + b"x",
        gz(ARCHIVE) + zst(ARCHIVE),
        gz(ARCHIVE) + gz(b"x"),
        zst(b""),
        zst(ARCHIVE) + b"garbage",
        zst(ARCHIVE) + zst(b"x"),
        zst(ARCHIVE) + gz(b""),
        gz(gz(ARCHIVE)),
        zst(ARCHIVE)[:4] + b"\xff" * 100,
        gz(ARCHIVE)[:2] + b"\xff" * 100,
    ],
)
def test_what_is_no_tar_is_refused(stream: bytes) -> None:
    with pytest.raises(BadArchive) as caught:
        read(stream)
    assert "offset" in caught.value.data


@pytest.mark.parametrize("coding", [gz, zst, zst_streamed])
def test_members_one_after_another_are_one_stream(coding: Callable[[bytes], bytes]) -> None:
    half = len(ARCHIVE) // 3
    stream = coding(ARCHIVE[:half]) + coding(b"") + coding(ARCHIVE[half:])
    assert len(read(stream)[0]) == 7


def test_frames_to_be_skipped_are_skipped() -> None:
    skip = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    assert len(read(skip + zst(ARCHIVE) + skip)[0]) == 7


@pytest.mark.parametrize("log", [27, 28, 31])
def test_the_window_of_a_zstd_stream_is_bounded(log: int) -> None:
    """That of `zstd --ultra -22` is taken, one of `--long=28` is refused before it is made."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=log)
    stream = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(
        stream, closefd=False
    ) as writer:
        writer.write(ARCHIVE)
    if log == 27:
        assert len(read(stream.getvalue())[0]) == 7
    else:
        with pytest.raises(BadArchive, match=rf"window of {1 << log - 20} MiB.*128.*--long"):
            read(stream.getvalue())


@pytest.mark.parametrize("size", [(1 << 27) + 1, 1 << 40])
def test_a_zstd_frame_of_one_segment_has_a_window_of_its_size(size: int) -> None:
    frame = b"\x28\xb5\x2f\xfd" + b"\xe0" + size.to_bytes(8, "little")
    with pytest.raises(BadArchive, match=rf"window of {size >> 20} MiB"):
        read(frame + b"\1\0\0")


@pytest.mark.parametrize("coding", [gz, zst])
def test_a_changed_byte_in_a_compressed_stream_is_noticed(
    coding: Callable[[bytes], bytes],
) -> None:
    stream = bytearray(coding(ARCHIVE))
    stream[-5] ^= 0x10  # of the checksum, or of what it is made over
    with pytest.raises(BadArchive):
        read(bytes(stream))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_damage_raises_anything_else(data: st.DataObject) -> None:
    coding = data.draw(st.sampled_from([PLAIN, gz, zst]))
    stream = bytearray(coding(ARCHIVE))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadArchive):
        read(bytes(stream))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000), st.sampled_from([b"", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"]))
def test_random_bytes_are_no_archive(noise: bytes, start: bytes) -> None:
    with pytest.raises(BadArchive):
        read(start + noise + b"x")


def header(name: str, **fields: Any) -> bytes:
    info, _ = entry(name, **fields)
    return info.tobuf(tarfile.GNU_FORMAT)


def fixed(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records: bytes) -> bytes:
    block = bytearray(header("pax", type=b"x", size=len(records)))
    return fixed(block) + records + bytes(-len(records) % 512)


@pytest.mark.parametrize(
    "stream",
    [
        header("negative", size=-5),
        header("x", type=b"L", size=2 << 20),
        header("x", type=b"x", size=2 << 20),
        header("x", uid=-1),
        header("x", gid=1 << 32),
        header("x", type=b"L", size=3) + b"abc" + bytes(509),
        pax(b"20 mtime=abcdefghij\n") + header("x"),
        pax(b"12 size=-10\n") + header("x"),
        pax(b"11 uid=1.5\n") + header("x"),
        pax(b"12 path=a\0b\n") + header("x"),
        pax(b"28 GNU.sparse.map=0,5,10\n\n\n\n") + header("x"),
        pax(b"24 GNU.sparse.map=0,512\n") + header("x", size=512) + bytes(512),
        pax(b"22 GNU.sparse.major=1\n") + header("x", size=512) + b"z" * 512,
        pax(b"22 GNU.sparse.major=1\n24 GNU.sparse.realsize=9\n")
        + header("x", size=512)
        + b"1\n8\n5\n".ljust(512, b"\0"),
        pax(b"22 GNU.sparse.major=1\n24 GNU.sparse.realsize=9\n")
        + header("x", size=512)
        + b"99999999999\n".ljust(512, b"\0"),
        pax(b"20 GNU.sparse.size=5\n28 GNU.sparse.map=3,1,0,1\n\n\n\n") + header("x"),
    ],
)
def test_headers_out_of_range_are_refused(stream: bytes) -> None:
    with pytest.raises(BadArchive) as caught:
        read(stream + bytes(1024))
    assert "offset" in caught.value.data


def test_what_is_known_of_a_time_is_kept() -> None:
    def mtime(text: str) -> int:
        record = f" mtime={text}\n"
        record = f"{len(record) + 2}{record}"
        return read(pax(record.encode()) + header("x") + bytes(1024))[0][0].mtime

    assert mtime("-1") == -1_000_000_000
    assert mtime("1.5") == 1_500_000_000
    assert mtime("-1.5") == -1_500_000_000
    assert mtime("0.0000000019") == 1
    assert mtime("99999999999") == 99_999_999_999 * 10**9


def test_a_global_header_is_passed_over() -> None:
    comment = b"52 comment=0123456789012345678901234567890123456789\n"
    block = bytearray(header("pax_global_header", type=b"g", size=len(comment)))
    stream = fixed(block) + comment + bytes(-len(comment) % 512) + header("x") + bytes(1024)
    assert [m.name for m in read(stream)[0]] == [b"x"]


def test_the_last_record_of_a_key_counts() -> None:
    stream = pax(b"10 path=a\n10 path=b\n") + header("x") + bytes(1024)
    assert [m.name for m in read(stream)[0]] == [b"b"]


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
}


@pytest.mark.mounts
@pytest.mark.parametrize("packing", PACKINGS)
async def test_the_diff_id_is_that_of_the_tar_whatever_it_is_packed_with(
    shelf: Shelf, tmp_path: Path, packing: str
) -> None:
    shelf.add("a")
    stream = tar(entry("big", random.Random(2).randbytes(700_001)), entry("small", b"x"))
    sent = PACKINGS[packing](stream)
    (tmp_path / "sent").write_bytes(sent)
    with (tmp_path / "sent").open("rb") as source:
        found = await shelf.jobs.apply(
            shelf.chain("a"), str(shelf.path("a")), source.fileno(), digest=True
        )
    assert found.digest == "sha256:" + hashlib.sha256(sent).hexdigest()
    assert found.diff_id == "sha256:" + hashlib.sha256(stream).hexdigest()


# --- descriptors --------------------------------------------------------------------------------


@pytest.mark.mounts
@pytest.mark.parametrize("kind", ["file", "pipe", "socket", "nonblocking-pipe"])
@pytest.mark.parametrize("digest", [False, True])
async def test_any_descriptor_carries_an_archive_both_ways(
    shelf: Shelf, kind: str, digest: bool
) -> None:
    shelf.add("a")
    body = random.Random(1).randbytes(3_000_001)
    stream = tar(entry("big", body), entry("small", b"x"))
    got = io.BytesIO()
    reader, writer = ends(kind)
    with reader, writer:
        feeder = threading.Thread(target=feed, args=(writer, stream))
        feeder.start()
        if kind == "file":
            feeder.join()
            os.lseek(reader.fileno(), 0, os.SEEK_SET)
        chain = shelf.chain("a")
        applied = await shelf.jobs.apply(
            chain, str(shelf.path("a")), reader.fileno(), digest=digest
        )
        feeder.join()
    assert (shelf.path("a") / "big").read_bytes() == body
    reader, writer = ends(kind)
    with reader:
        with writer:
            drain = threading.Thread(target=lambda: got.write(drained(reader, kind)))
            if kind != "file":
                drain.start()
            packed = await shelf.jobs.diff(chain, writer.fileno(), digest=digest)
        if kind == "file":
            os.lseek(reader.fileno(), 0, os.SEEK_SET)
            drain.start()
        await trio.to_thread.run_sync(drain.join)
    assert len(got.getvalue()) == packed.size
    if digest:
        assert applied.digest == "sha256:" + hashlib.sha256(stream).hexdigest()
        assert packed.digest == "sha256:" + hashlib.sha256(got.getvalue()).hexdigest()
    shelf.add("b")
    await shelf.apply(got.getvalue(), "b")
    assert (shelf.path("b") / "big").read_bytes() == body


class End(io.FileIO):
    """One end of a stream."""


def ends(kind: str) -> tuple[End, End]:
    if kind == "file":
        fd, name = tempfile.mkstemp()
        os.unlink(name)
        return End(fd, "r+"), End(os.dup(fd), "r+")
    if kind == "socket":
        a, b = socket.socketpair()
        return End(a.detach(), "r+"), End(b.detach(), "r+")
    r, w = os.pipe()
    if kind == "nonblocking-pipe":
        os.set_blocking(r, False)
        os.set_blocking(w, False)
    return End(r, "r"), End(w, "w")


def feed(writer: End, stream: bytes) -> None:
    view = memoryview(stream)
    while view:
        sent = writer.write(view[:50_000])
        if sent is None:
            select.select([], [writer], [])
        else:
            view = view[sent:]
    writer.close()


def drained(reader: End, kind: str) -> bytes:
    os.set_blocking(reader.fileno(), True)
    return reader.readall() or b""


@pytest.mark.mounts
async def test_a_reader_that_goes_away_breaks_the_stream(shelf: Shelf) -> None:
    at = shelf.add("a")
    (at / "big").write_bytes(bytes(5_000_000))
    r, w = os.pipe()
    os.close(r)
    try:
        with pytest.raises(StreamBroken) as caught:
            await shelf.jobs.diff(shelf.chain("a"), w)
    finally:
        os.close(w)
    assert caught.value.data["errno"] == "EPIPE"


@pytest.mark.mounts
async def test_a_full_disk_behind_the_descriptor_breaks_the_stream(shelf: Shelf) -> None:
    at = shelf.add("a")
    (at / "big").write_bytes(bytes(5_000_000))
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(StreamBroken) as caught:
        await shelf.jobs.diff(shelf.chain("a"), full.fileno())
    assert caught.value.data["errno"] == "ENOSPC"


@pytest.mark.mounts
async def test_the_stream_is_drained_so_that_no_sender_breaks(shelf: Shelf) -> None:
    shelf.add("a")
    stream = tar(entry("x", b"x")) + bytes(1_000_000)
    r, w = os.pipe()
    with End(r, "r") as reader:
        feeder = threading.Thread(target=feed, args=(End(w, "w"), stream))
        feeder.start()
        result = await shelf.jobs.apply(
            shelf.chain("a"), str(shelf.path("a")), reader.fileno(), digest=True
        )
        await trio.to_thread.run_sync(feeder.join)
    assert result.digest == "sha256:" + hashlib.sha256(stream).hexdigest()
