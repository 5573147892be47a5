"""The journal gives back the table, whole or up to where it was cut."""

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from aufsd.active import journal, refs, statedir
from aufsd.active.journal import Journal
from aufsd.active.refs import Entry, Reference, State
from aufsd.active.statedir import JOURNAL, LOCK, Owner, StateDir, open_state_dir
from aufsd.kernel import syscalls
from aufsd.store.ids import LayerId
from aufsd_client.errors import StoreLocked

STORE, OTHERS = Owner("a" * 32, "/store"), Owner("b" * 32, "/other")
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


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDir]:
    with closing(open_state_dir(str(tmp_path), STORE.root)) as opened:
        yield opened


def test_what_was_recorded_is_read_back(state: StateDir) -> None:
    table: dict[LayerId, Entry] = {A: HELD}
    book = Journal(state, STORE, table)
    table[B] = HELD
    book.record(B, HELD, table)
    del table[A]
    book.record(A, None, table)
    book.close()
    assert journal.read(state, STORE).table == {B: HELD}


def test_cut_at_any_byte_it_is_read_up_to_the_cut(state: StateDir, tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    book = Journal(state, STORE, {})
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
        found = journal.read(state, STORE)
        assert found.table == states[max(lines - 1, 0)]
        # what is lost is told: that more than whole lines were cut off nobody can see
        assert bool(found.damage) == (cut not in ends)


def test_what_follows_a_change_to_nothing_is_not_believed(state: StateDir) -> None:
    book = Journal(state, STORE, {A: HELD})
    book.dropped(A, 1, {})
    book.record(B, HELD, {})
    book.close()
    found = journal.read(state, STORE)
    assert found.table == {A: HELD}
    assert "is damaged in line 3 of 4: " in found.damage
    book = Journal(state, STORE, {A: HELD})
    book.counted(B, OTHER, {})
    book.record(B, HELD, {})
    book.close()
    assert journal.read(state, STORE).table == {A: HELD}


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"\xff\n", b"{}\n", b'{"t":"header","format":9}\n', b"\n"),
        b'{"t":"dropped","id":"a","at":0}\n',
    ],
)
def test_a_journal_that_is_none_counts_nothing_and_is_told(
    state: StateDir, tmp_path: Path, line: bytes
) -> None:
    (tmp_path / JOURNAL).write_bytes(line)
    assert state.give_to(STORE) == []
    table, damage = journal.read(state, STORE)
    assert table == {}
    assert "is damaged in line 1 of 1: " in damage


@pytest.mark.parametrize("kind", ["directory", "fifo", "symlink"])
def test_what_is_no_file_in_the_journals_place_is_told(
    state: StateDir, tmp_path: Path, kind: str
) -> None:
    if kind == "directory":
        (tmp_path / JOURNAL).mkdir()
    elif kind == "fifo":
        os.mkfifo(tmp_path / JOURNAL)
    else:
        (tmp_path / JOURNAL).symlink_to("/dev/zero")
    assert state.give_to(STORE) == []
    table, damage = journal.read(state, STORE)
    assert (table, damage) == ({}, f"{tmp_path}/{JOURNAL} is no file: what it counted is not known")
    book = Journal(state, STORE, {A: HELD})
    assert bool(book.failure) == (kind == "directory")
    book.close()


def test_another_boot_or_another_store_counts_nothing(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal(state, STORE, {A: HELD}).close()
    assert journal.read(state, STORE).table == {A: HELD}
    assert journal.read(state, Owner(STORE.store, "/other")).table == {}
    assert journal.read(state, Owner(OTHERS.store, STORE.root)).table == {}
    monkeypatch.setattr(statedir, "boot_id", lambda: "another")
    assert journal.read(state, STORE) == ({}, "")


def test_a_journal_without_the_stores_id_counts_for_its_root(state: StateDir) -> None:
    """An older aufsd wrote it, or the disk was too full to give the store one."""
    Journal(state, Owner("", STORE.root), {A: HELD}).close()
    assert state.give_to(STORE) == []
    assert journal.read(state, STORE).table == {A: HELD}


@pytest.mark.parametrize(
    "others",
    [OTHERS, Owner(STORE.store, "/copy"), Owner(OTHERS.store, STORE.root), Owner("", "/older")],
)
def test_the_journal_of_another_store_is_kept_aside_and_comes_back(
    state: StateDir, tmp_path: Path, others: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = f"mounts.{others.store or 'older'}.journal"
    Journal(state, others, {A: HELD}).close()
    (told,) = state.give_to(STORE)
    assert f"at {others.root}: it is kept as {kept}" in told
    assert journal.read(state, STORE) == ({}, "")
    Journal(state, STORE, {B: HELD}).close()
    assert state.give_to(STORE) == []
    # a second one of that name replaces none
    Journal(state, Owner(others.store, "/third"), {}).close()
    (told,) = state.give_to(STORE)
    assert f"is kept as {kept.removesuffix('journal')}2.journal" in told
    Journal(state, STORE, {B: HELD}).close()
    away, back = state.give_to(others)
    assert f"at {STORE.root}: it is kept as mounts.{STORE.store}." in away
    assert back == f"{tmp_path}/{kept} is of this store: its counts are taken back"
    assert journal.read(state, others) == ({A: HELD}, "")
    # after a boot nothing is mounted, and nothing worth keeping
    monkeypatch.setattr(statedir, "boot_id", lambda: "another")
    assert state.give_to(STORE) == []


def test_a_state_directory_is_one_daemons(state: StateDir, tmp_path: Path) -> None:
    with pytest.raises(StoreLocked, match=r"^another daemon keeps its table of mounts in "):
        open_state_dir(str(tmp_path), "/other")
    Journal(state, STORE, {}).close()
    with pytest.raises(StoreLocked, match=r"^the daemon that serves /store keeps its table "):
        open_state_dir(str(tmp_path), "/other")
    with pytest.raises(StoreLocked, match=r"^another process serves /store; "):
        open_state_dir(str(tmp_path), STORE.root)


def test_a_lock_that_any_user_can_have_keeps_no_daemon_from_its_state_directory(
    tmp_path: Path,
) -> None:
    """`aufsctl load` has one on the directory of the sockets, which is the same by default."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        open_state_dir(str(tmp_path), STORE.root).close()
        assert stat.S_IMODE((tmp_path / LOCK).stat().st_mode) == 0o700
    finally:
        os.close(fd)


def test_a_state_directory_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    """As what cleans /tmp does; nobody would read what is written into a deleted file."""
    at = tmp_path / "run"
    at.mkdir()
    with closing(open_state_dir(str(at), STORE.root)) as state:
        book = Journal(state, STORE, {A: HELD})
        shutil.rmtree(at)
        book.record(B, HELD, {A: HELD, B: HELD})
        assert book.failure == ""
        assert journal.read(state, STORE).table == {A: HELD, B: HELD}
        assert sorted(os.listdir(at)) == [LOCK, JOURNAL]
        (at / JOURNAL).unlink()
        book.record(A, None, {B: HELD})
        assert journal.read(state, STORE).table == {B: HELD}
        # what another daemon has made there meanwhile is its own
        shutil.rmtree(at)
        at.mkdir()
        with closing(open_state_dir(str(at), "/other")) as other:
            Journal(other, OTHERS, {}).close()
            book.record(A, HELD, {A: HELD, B: HELD})
            assert "Resource temporarily unavailable" in book.failure
            assert journal.read(other, OTHERS) == ({}, "")
        book.close()


def test_it_is_written_anew_before_it_grows_without_end(state: StateDir, tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    book = Journal(state, STORE, {})
    for _ in range(20_000):
        book.record(A, HELD, {A: HELD})
    book.close()
    assert path.read_bytes().count(b"\n") < 10_000
    assert journal.read(state, STORE).table == {A: HELD}


def test_what_is_held_is_written_in_one_piece(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    table: dict[LayerId, Entry] = {A: HELD}
    book = Journal(state, STORE, table)
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
    assert journal.read(state, STORE).table == {A: HELD}
    book.write_buffered(table)
    assert (book.buffered, pieces) == ([], [3])
    swapped = refs.without(refs.counted(HELD, OTHER), 0)
    assert journal.read(state, STORE).table == {A: swapped, B: HELD}
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
    with (
        small_tmpfs(tmp_path / "small", "size=32k") as small,
        closing(open_state_dir(str(small), STORE.root)) as state,
    ):
        table: dict[LayerId, Entry] = {A: HELD}
        book = Journal(state, STORE, table)
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
        assert journal.read(state, STORE).table == {A: HELD, B: HELD}
        filler.unlink()
        book.record(B, HELD, table)
        assert book.failure == ""
        assert journal.read(state, STORE).table == {B: HELD}
        book.close()
        assert sorted(os.listdir(small)) == [LOCK, JOURNAL]


@pytest.mark.mounts
def test_held_lines_that_do_not_fit_are_made_up_for(tmp_path: Path) -> None:
    with (
        small_tmpfs(tmp_path / "small", "size=32k") as small,
        closing(open_state_dir(str(small), STORE.root)) as state,
    ):
        table: dict[LayerId, Entry] = {A: HELD}
        book = Journal(state, STORE, table)
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
        assert journal.read(state, STORE).table == {A: HELD}
        filler.unlink()
        book.start_buffering()
        book.record(B, HELD, table)
        book.write_buffered(table)
        assert book.failure == ""
        assert journal.read(state, STORE).table == table
        book.close()


@pytest.mark.mounts
def test_a_state_directory_that_is_full_at_start_stops_nothing(tmp_path: Path) -> None:
    with (
        small_tmpfs(tmp_path / "small", "size=4k,nr_inodes=1") as small,
        closing(open_state_dir(str(small), STORE.root)) as state,
    ):
        book = Journal(state, STORE, {})
        assert book.failure
        book.record(A, HELD, {A: HELD})
        book.close()


def test_a_journal_of_the_first_release_is_read(state: StateDir, tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    Journal(state, Owner("", STORE.root), {}).close()
    with path.open("a") as file:
        file.write(
            '{"t":"entry","id":"a","entry":{"state":"mounted","union":true,"references":'
            '[{"pid":7,"uid":0,"comm":"sh","hold":"process","since":1.5,"start":99}],'
            '"label":"label","read_only":false,"since":2.0,"backend":"overlay"}}\n'
        )
    assert journal.read(state, STORE) == ({A: HELD}, "")
