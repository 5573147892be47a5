"""Layers without a daemon: a store's directories, real archive jobs, and snapshots of trees."""

import hashlib
import os
import stat
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from aufsd.archive.fork import ForkServer
from aufsd.archive.jobs import Jobs, open_jobs
from aufsd.archive.requests import Branch, Limits
from aufsd.results import Streamed
from aufsd.store import dialect as marks
from aufsd.store import whiteouts
from aufsd.store.dialect import Dialect
from aufsd.store.layout import Layout
from tests.tiers import ROOT_IN_HOST

NAMESPACE: Literal["trusted", "user"] = "trusted" if ROOT_IN_HOST else "user"

# as an ordinary user the tests run in a user namespace that has no other owners, and no devices
needs_root = pytest.mark.root


@dataclass(slots=True)
class Shelf:
    """A store's directories with layers in them, and the jobs that work on them."""

    layout: Layout
    jobs: Jobs

    def path(self, id: str) -> Path:
        """A layer's content."""
        return Path(self.layout.diff, id)

    def add(self, id: str, dialect: Dialect = Dialect.AUFS) -> Path:
        """An empty layer."""
        path = self.path(id)
        path.mkdir()
        path.chmod(0o755)
        for name, value in marks.xattrs(dialect, NAMESPACE).items():
            os.setxattr(path, name, value)
        return path

    def chain(self, *ids: str) -> tuple[Branch, ...]:
        """Layers as a chain, the topmost first."""
        return tuple(Branch(id, marks.read_dialect(self.path(id), NAMESPACE)) for id in ids)

    async def apply(self, stream: bytes, *ids: str, digest: bool = False) -> Streamed:
        """Unpack a tar straight into the first layer of a chain."""
        with tempfile.TemporaryFile() as file:
            file.write(stream)
            file.seek(0)
            chain = self.chain(*ids)
            return await self.jobs.apply(
                chain, str(self.path(ids[0])), file.fileno(), digest=digest
            )

    async def merge(self, stream: bytes, *ids: str) -> Streamed:
        """Unpack a tar into a layer with content, through staging as the driver does it."""
        staged = Path(tempfile.mkdtemp(dir=self.layout.staging))
        await self.jobs.clone(ids[0], str(staged))
        with tempfile.TemporaryFile() as file:
            file.write(stream)
            file.seek(0)
            result = await self.jobs.apply(self.chain(*ids), str(staged), file.fileno())
        self.path(ids[0]).rename(f"{self.layout.removing}/{staged.name}")
        staged.rename(self.path(ids[0]))
        return result

    async def diff(self, *ids: str, against: tuple[str, ...] | None = None) -> bytes:
        """The tar of a layer, or of the difference between two chains."""
        return (await self.pack(*ids, against=against))[0]

    async def pack(
        self, *ids: str, against: tuple[str, ...] | None = None
    ) -> tuple[bytes, Streamed]:
        """As `diff`, with the result."""
        other = None if against is None else self.chain(*against)
        with tempfile.TemporaryFile() as file:
            result = await self.jobs.diff(self.chain(*ids), file.fileno(), against=other)
            file.seek(0)
            return file.read(), result


@asynccontextmanager
async def open_shelf(
    root: Path, server: ForkServer | None = None, **options: Any
) -> AsyncIterator[Shelf]:
    """A shelf below an empty directory; `server` is one that runs already, which saves time."""
    layout = Layout(str(root))
    for path in (layout.layers, layout.diff, layout.mnt, layout.staging, layout.removing):
        os.makedirs(path, exist_ok=True)
    settings: dict[str, Any] = {"uid_maps": (), "gid_maps": (), "limits": Limits(), "sync": "none"}
    settings |= {"xattr_namespace": NAMESPACE, **options}
    async with open_jobs(layout, server=server, **settings) as jobs:
        yield Shelf(layout, jobs)


class Entry(NamedTuple):
    """All that an archive keeps of a file; `links` are the other names of its inode."""

    mode: int
    uid: int
    gid: int
    mtime: int
    content: bytes
    device: int
    xattrs: Mapping[str, bytes]
    links: frozenset[bytes]


def snapshot(root: Path | str) -> dict[bytes, Entry]:
    """Everything below a directory, `.` for itself; times in whole seconds, and none of marks."""
    inodes: dict[int, set[bytes]] = {}
    found: dict[bytes, tuple[os.stat_result, Entry]] = {}
    top = os.fsencode(root)
    for path, status in _walk(top):
        name = os.path.relpath(path, top)
        if not stat.S_ISDIR(status.st_mode):
            inodes.setdefault(status.st_ino, set()).add(name)
        found[name] = (status, _entry(path, status))
    return {
        name: entry._replace(
            links=frozenset()
            if stat.S_ISDIR(entry.mode) or os.path.basename(name).startswith(b".wh.")
            else frozenset(inodes[status.st_ino])
        )
        for name, (status, entry) in found.items()
    }


def _walk(top: bytes) -> list[tuple[bytes, os.stat_result]]:
    rows = []
    pending = [top]
    while pending:
        path = pending.pop()
        status = os.lstat(path)
        rows.append((path, status))
        if stat.S_ISDIR(status.st_mode):
            pending += [os.path.join(path, name) for name in os.listdir(path)]
    return rows


def _entry(path: bytes, status: os.stat_result) -> Entry:
    content = b""
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
    elif stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    xattrs = {
        name: os.getxattr(path, name, follow_symlinks=False)
        for name in os.listxattr(path, follow_symlinks=False)
        if not name.startswith((f"{NAMESPACE}.aufsd.", "security.selinux"))
    }
    return Entry(
        status.st_mode,
        status.st_uid,
        status.st_gid,
        0 if whiteouts.is_whiteout_node(status) else status.st_mtime_ns // 10**9,
        content,
        status.st_rdev,
        xattrs,
        frozenset(),
    )
