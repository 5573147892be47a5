"""The active-mount table in the state directory: one line a change, replayed at start.

It lies on a tmpfs (/run) and dies with the mounts at a reboot, so nothing is synced: a write to a
tmpfs is a copy in memory, which is why it may stand inline in the event loop. What it must survive
is the daemon's own death at any point: a line cut short is ignored, and so is what follows it.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from aufsd.refs import Entry
from aufsd.store.ids import LayerId

_FORMAT = 1
# lines beyond twice the table's size, and these many, make the file be written anew
_SLACK = 4096


class _Header(msgspec.Struct, tag="header", tag_field="t"):
    format: int
    boot: str
    root: str


class _Line(msgspec.Struct, tag="entry", tag_field="t", omit_defaults=True):
    id: str
    entry: Entry | None = None


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Header | _Line)


def boot_id() -> str:
    """The kernel's id of this boot (random(4), proc files)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read(path: str, root: str) -> dict[LayerId, Entry]:
    """The table as the last whole line leaves it; empty after a reboot or for another root."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    table: dict[LayerId, Entry] = {}
    # what follows the last newline was cut while it was written
    for number, line in enumerate(lines[:-1]):
        try:
            record = _decoder.decode(line)
        except msgspec.DecodeError:
            break
        if number == 0:
            expected = _Header(_FORMAT, boot_id(), root)
            if record != expected:
                return {}
        elif isinstance(record, _Line):
            if record.entry is None:
                table.pop(LayerId(record.id), None)
            else:
                table[LayerId(record.id)] = record.entry
    return table


class Journal:
    """Writes the changes. Owns its descriptor until `close`."""

    def __init__(self, path: str, root: str, table: Mapping[LayerId, Entry]) -> None:
        self._path = path
        self._root = root
        self._fd = -1
        self._lines = 0
        self.rewrite(table)

    def rewrite(self, table: Mapping[LayerId, Entry]) -> None:
        """Write the whole table to a new file and put it in the old one's place."""
        fresh = f"{self._path}.new"
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        records: list[_Header | _Line] = [_Header(_FORMAT, boot_id(), self._root)]
        records += [_Line(id, entry) for id, entry in table.items()]
        _write(fd, b"".join(_encoder.encode(record) + b"\n" for record in records))
        os.rename(fresh, self._path)
        self.close()
        self._fd = fd
        self._lines = len(records)

    def record(self, id: LayerId, entry: Entry | None, table: Mapping[LayerId, Entry]) -> None:
        """Write down that `id` now has this entry (None: none), as `table` already says."""
        _write(self._fd, _encoder.encode(_Line(id, entry)) + b"\n")
        self._lines += 1
        if self._lines > 2 * len(table) + _SLACK:
            self.rewrite(table)

    def close(self) -> None:
        """Close the file; it stays on disk for the next start."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _write(fd: int, data: bytes) -> None:
    while (done := os.write(fd, data)) < len(data):
        data = data[done:]
