"""The active-mount table in the state directory: one line a change, replayed at start.

A line is an entry as it is now, or one reference more or less of it: a base layer that a thousand
sandboxes hold is not written out whole whenever one comes or goes.

It lies on a tmpfs (/run) and dies with the mounts at a reboot, so nothing is synced: a write to a
tmpfs is a copy in memory, which is why it may stand inline in the event loop. What it must survive
is the daemon's own death at any point: a line cut short is ignored, and so is what follows it.

A file system that is full, or gone, is no reason to refuse a mount, nor to forget one: the table in
memory is right, the file is behind it until it can be written anew, and `failure` says so.
"""

import contextlib
import os
from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec
import structlog

from aufsd.active import refs
from aufsd.active.refs import Entry, Reference
from aufsd.active.statedir import JOURNAL, NO_FILE, Header, Owner, StateDir, header_for
from aufsd.store.ids import LayerId

log = structlog.get_logger(__name__)

# lines beyond twice the table's size, and these many, make the file be written anew
_SLACK = 4096
_FRESH: Final = f"{JOURNAL}.new"
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


class _Line(msgspec.Struct, tag="entry", tag_field="t", omit_defaults=True):
    id: str
    entry: Entry | None = None


class _Counted(msgspec.Struct, tag="counted", tag_field="t"):
    id: str
    reference: Reference


class _Dropped(msgspec.Struct, tag="dropped", tag_field="t"):
    id: str
    at: int


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Header | _Line | _Counted | _Dropped)


class Recorded(NamedTuple):
    """The table of a journal, and what of it could not be read, "" if all of it could."""

    table: dict[LayerId, Entry]
    damage: str = ""


def read(state: StateDir, owner: Owner) -> Recorded:
    """The table as the last whole line leaves it; empty after a reboot or of another store.

    Raises OSError if the journal cannot be read now.
    """
    try:
        *lines, rest = state.read(JOURNAL).split(b"\n")
    except FileNotFoundError:
        return Recorded({})
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        return Recorded({}, f"{state.file(JOURNAL)} is no file: what it counted is not known")
    table: dict[LayerId, Entry] = {}
    for number, line in enumerate(lines):
        try:
            record = _decoder.decode(line)
            if isinstance(record, Header) == bool(number):
                raise LookupError
            if not isinstance(record, Header):
                _replay(table, record)
            elif not record.is_of(owner):
                return Recorded({})
        except (msgspec.DecodeError, LookupError):
            return Recorded(table, _damage(state, number, len(lines)))
    # what follows the last newline was cut while it was written
    cut = bool(rest) or not lines
    return Recorded(table, _damage(state, len(lines), len(lines) + 1) if cut else "")


def _damage(state: StateDir, whole: int, of: int) -> str:
    return (
        f"{state.file(JOURNAL)} is damaged in line {whole + 1} of {of}: what stood there and after "
        "it is not known, and counts may be wrong"
    )


def _replay(table: dict[LayerId, Entry], record: _Line | _Counted | _Dropped) -> None:
    """Do what a line says. LookupError if there is nothing there that it could be done to."""
    id = LayerId(record.id)
    if isinstance(record, _Counted):
        table[id] = refs.counted(table[id], record.reference)
    elif isinstance(record, _Dropped):
        if not 0 <= record.at < len(table[id].references):
            raise IndexError(record.at)
        table[id] = refs.without(table[id], record.at)
    elif record.entry is None:
        table.pop(id, None)
    else:
        table[id] = record.entry


class Journal:
    """Writes the changes, into a state directory that outlives it. Owns the file until `close`.

    `failure` is why the file is behind the table; "" while it is not.
    """

    def __init__(self, state: StateDir, owner: Owner, table: Mapping[LayerId, Entry]) -> None:
        self.failure = ""
        self._state = state
        self._path = state.file(JOURNAL)
        self._owner = owner
        self._fd = -1
        self._lines = 0
        self._size = 0
        # always this one list
        self.buffered: list[bytes] = []
        self.buffering = False
        self.rewrite(table)

    def start_buffering(self) -> None:
        """Buffer new lines. `write_buffered` has to follow before the next await."""
        self.buffering = True

    def write_buffered(self, table: Mapping[LayerId, Entry]) -> None:
        """Write the buffered lines in one piece, and buffer no more. `table` has the changes."""
        self.buffering = False
        if self.buffered:
            data, lines = b"".join(self.buffered), len(self.buffered)
            self.buffered.clear()
            self._write(data, lines, table)

    def rewrite(self, table: Mapping[LayerId, Entry]) -> None:
        """Write the whole table to a new file and put it in the old one's place.

        If that fails the old one stays as it is, and `failure` says why.
        """
        records: list[Header | _Line] = [header_for(self._owner)]
        records += [_Line(id, entry) for id, entry in table.items()]
        data = b"".join(_encoder.encode(record) + b"\n" for record in records)
        fd = -1
        try:
            if self._state.renew():
                log.warning("the state directory was deleted, and is made again", path=self._path)
            fd = os.open(_FRESH, _CREATE, 0o600, dir_fd=self._state.fd)
            _write(fd, data)
            self._state.rename(_FRESH, JOURNAL)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
                with contextlib.suppress(OSError):
                    os.unlink(_FRESH, dir_fd=self._state.fd)
            self._failed(error)
            return
        self.close()
        self._fd, self._lines, self._size = fd, len(records), len(data)
        if self.failure:
            self.failure = ""
            log.info("the journal is written again", path=self._path)

    def record(self, id: LayerId, entry: Entry | None, table: Mapping[LayerId, Entry]) -> None:
        """Write down that `id` now has this entry (None: none), as `table` already says.

        While the file is behind, each change is a chance to write it anew. Never raises: what has
        happened has happened, whether or not it could be written down.
        """
        self._append(_Line(id, entry), table)

    def counted(self, id: LayerId, reference: Reference, table: Mapping[LayerId, Entry]) -> None:
        """As `record`: the entry last recorded for `id` has one reference more, at its end."""
        self._append(_Counted(id, reference), table)

    def dropped(self, id: LayerId, at: int, table: Mapping[LayerId, Entry]) -> None:
        """As `record`: the entry last recorded for `id` has lost the reference at `at`."""
        self._append(_Dropped(id, at), table)

    def _append(self, record: _Line | _Counted | _Dropped, table: Mapping[LayerId, Entry]) -> None:
        line = _encoder.encode(record) + b"\n"
        if self.buffering:
            self.buffered.append(line)
        else:
            self._write(line, 1, table)

    def _write(self, data: bytes, lines: int, table: Mapping[LayerId, Entry]) -> None:
        if self.failure:
            self.rewrite(table)
            return
        try:
            _write(self._fd, data)
        except OSError as error:
            # what follows a line that was written in part could not be read
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            self._failed(error)
            self.rewrite(table)
            return
        self._lines += lines
        self._size += len(data)
        # deleted, by who cleans up: what is written there nobody will read
        gone = not os.fstat(self._fd).st_nlink
        if gone or self._lines > 2 * len(table) + _SLACK:
            self.rewrite(table)

    def _failed(self, error: OSError) -> None:
        if not self.failure:
            log.error("the journal cannot be written", path=self._path, error=error.strerror)
        self.failure = f"{self._path}: {error.strerror}"

    def close(self) -> None:
        """Close the file; it stays on disk for the next start."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _write(fd: int, data: bytes) -> None:
    while (done := os.write(fd, data)) < len(data):
        data = data[done:]
