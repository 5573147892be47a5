"""The journal gives back the table, whole or up to where it was cut."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aufsd.active import journal, refs
from aufsd.active.journal import Journal
from aufsd.active.refs import Entry, Reference, State
from aufsd.kernel import syscalls
from aufsd.store.ids import LayerId

A, B = LayerId("a"), LayerId("b")
HELD = Entry(
    State.ACTIVE,
    True,
    (Reference(7, 0, "sh", "process", 1.5, 99),),
    "label",
    False,
    2.0,
    "overlay",
)

OTHER = Reference(8, 0, "sh", "manual", 2.5, 11)


def test_what_was_recorded_is_read_back(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    table: dict[LayerId, Entry] = {A: HELD}
    book = Journal(path, "/store", table)
    table[B] = HELD
    book.record(B, HELD, table)
    del table[A]
    book.record(A, None, table)
    book.close()
    assert journal.read(path, "/store") == {B: HELD}


def test_cut_at_any_byte_it_is_read_up_to_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    book = Journal(str(path), "/store", {})
    book.record(A, HELD, {A: HELD})
    book.record(B, HELD, {A: HELD, B: HELD})
    book.counted(B, OTHER, {})
    book.dropped(B, 0, {})
    book.close()
    whole = path.read_bytes()
    both = refs.counted(HELD, OTHER)
    states = [
        {},
        {A: HELD},
        {A: HELD, B: HELD},
        {A: HELD, B: both},
        {A: HELD, B: refs.without(both, 0)},
    ]
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = sum(1 for end in ends if end <= cut)
        assert journal.read(str(path), "/store") == states[max(lines - 1, 0)]


def test_what_follows_a_change_to_nothing_is_not_believed(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    book = Journal(path, "/store", {A: HELD})
    book.dropped(A, 1, {})
    book.record(B, HELD, {})
    book.close()
    assert journal.read(path, "/store") == {A: HELD}
    book = Journal(path, "/store", {A: HELD})
    book.counted(B, OTHER, {})
    book.record(B, HELD, {})
    book.close()
    assert journal.read(path, "/store") == {A: HELD}


@pytest.mark.parametrize("line", [b"\xff\n", b"{}\n", b'{"t":"header","format":9}\n', b"\n"])
def test_a_journal_that_is_none_counts_nothing(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(line)
    assert journal.read(str(path), "/store") == {}


def test_another_boot_or_another_root_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "journal")
    Journal(path, "/store", {A: HELD}).close()
    assert journal.read(path, "/store") == {A: HELD}
    assert journal.read(path, "/other") == {}
    monkeypatch.setattr(journal, "boot_id", lambda: "another")
    assert journal.read(path, "/store") == {}


def test_it_is_written_anew_before_it_grows_without_end(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    book = Journal(str(path), "/store", {})
    for _ in range(20_000):
        book.record(A, HELD, {A: HELD})
    book.close()
    assert path.read_bytes().count(b"\n") < 10_000
    assert journal.read(str(path), "/store") == {A: HELD}


def test_what_is_held_is_written_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "journal")
    table: dict[LayerId, Entry] = {A: HELD}
    book = Journal(path, "/store", table)
    pieces: list[int] = []
    write = os.write

    def counted(fd: int, data: bytes) -> int:
        pieces.append(data.count(b"\n"))
        return write(fd, data)

    monkeypatch.setattr(os, "write", counted)
    book.start_buffering()
    book.counted(A, OTHER, table)
    book.dropped(A, 0, table)
    book.record(B, HELD, table)
    assert len(book.buffered) == 3
    assert journal.read(path, "/store") == {A: HELD}
    book.write_buffered(table)
    assert (book.buffered, pieces) == ([], [3])
    assert journal.read(path, "/store") == {A: refs.without(refs.counted(HELD, OTHER), 0), B: HELD}
    book.record(B, None, table)
    assert pieces == [3, 1]
    book.close()


@contextmanager
def small_tmpfs(at: Path, options: str) -> Iterator[Path]:
    """A tmpfs with no more room than these options give it."""
    at.mkdir()
    syscalls.mount("tmpfs", str(at), "tmpfs", 0, options)
    try:
        yield at
    finally:
        syscalls.umount2(str(at))


def fill(directory: Path) -> Path:
    """Fill a small file system up; the file that does so."""
    filler = directory / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(b"x" * (1 << 20))
    return filler


@pytest.mark.mounts
def test_a_full_file_system_fails_no_change_and_is_made_up_for(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "small", "size=32k") as small:
        path = str(small / "journal")
        table: dict[LayerId, Entry] = {A: HELD}
        book = Journal(path, "/store", table)
        filler = fill(small)
        # what still fits into the last page is written down, what follows is not
        while not book.failure:
            table[B] = HELD
            book.record(B, HELD, table)
        assert "No space" in book.failure
        del table[A]
        book.record(A, None, table)
        assert book.failure
        # the file is behind, and readable to its last whole line
        assert journal.read(path, "/store") == {A: HELD, B: HELD}
        filler.unlink()
        book.record(B, HELD, table)
        assert book.failure == ""
        assert journal.read(path, "/store") == {B: HELD}
        book.close()
        assert os.listdir(small) == ["journal"]


@pytest.mark.mounts
def test_held_lines_that_do_not_fit_are_made_up_for(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "small", "size=32k") as small:
        path = str(small / "journal")
        table: dict[LayerId, Entry] = {A: HELD}
        book = Journal(path, "/store", table)
        filler = fill(small)
        book.start_buffering()
        for _ in range(100):
            book.counted(A, OTHER, table)
            book.dropped(A, 1, table)
        table[B] = HELD
        book.record(B, HELD, table)
        assert book.failure == ""
        book.write_buffered(table)
        assert "No space" in book.failure
        # nothing of what was written in part is left
        assert journal.read(path, "/store") == {A: HELD}
        filler.unlink()
        book.start_buffering()
        book.record(B, HELD, table)
        book.write_buffered(table)
        assert book.failure == ""
        assert journal.read(path, "/store") == table
        book.close()


@pytest.mark.mounts
def test_a_state_directory_that_is_full_at_start_stops_nothing(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "small", "size=4k,nr_inodes=1") as small:
        book = Journal(str(small / "journal"), "/store", {})
        assert book.failure
        book.record(A, HELD, {A: HELD})
        book.close()


def test_a_journal_of_the_first_release_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(str(path), "/store", {}).close()
    with path.open("a") as file:
        file.write(
            '{"t":"entry","id":"a","entry":{"state":"mounted","union":true,"references":'
            '[{"pid":7,"uid":0,"comm":"sh","hold":"process","since":1.5,"start":99}],'
            '"label":"label","read_only":false,"since":2.0,"backend":"overlay"}}\n'
        )
    assert journal.read(str(path), "/store") == {A: HELD}
