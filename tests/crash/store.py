"""What a layer is, seen from outside the daemon, and whether a store is in order."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aufsd.archive.relabel import XATTR
from aufsd.kernel import mountinfo
from aufsd_client import Client
from tests.crash.subject import Subject
from tests.daemon import eventually

# What is no content: marks that overlayfs keeps for itself on an upper directory, from its first
# mount on; and the record for deep checks, which is dropped before a mount that may then fail. A
# record that is wrong is what the deep check in `disorder` would say.
_MARKS = (
    *("trusted.overlay.origin", "trusted.overlay.impure", "trusted.overlay.uuid"),
    "trusted.aufsd.fingerprint",
    # how large a sealed layer is, which says nothing before it is sealed
    "trusted.aufsd.usage",
    # of a snapshot: by which ids and numbers it is told from its parent, and whose child it is
    *("trusted.aufsd.origin", "trusted.aufsd.parent"),
)
_PRIVATE = {
    *("lock", "format", "staging", "removing", "quarantine", "probes", "work", "empty"),
    "format.new",
    "jobs",
}
# emptied at start, or by the deletion in the background
_EMPTIED = ("staging", "removing", "probes")


@dataclass(frozen=True)
class Seen:
    """One layer: its parents file, its content, and its line in the table."""

    parents: bytes
    content: tuple[object, ...]
    references: int
    mounted: bool
    sealed: bool


def look(subject: Subject, client: Client, id: str) -> Seen | None:
    """The layer as it is now; None if nothing of it is there."""
    root = subject.root
    rows = client.list(after="", limit=10_000).layers
    row = next((row for row in rows if row.id == id), None)
    found = [sub for sub in ("layers", "diff", "mnt") if (root / sub / id).exists()]
    if row is None and not found:
        return None
    assert row is not None, f"{id} is not listed, but is in {found}"
    assert len(found) == 3, f"{id} is listed, but only in {found}"
    # a parent may be named after the layer
    content: list[object] = list(_tree(root / "diff" / id))
    for row_below in rows:
        # what a checkpoint made of it
        if row_below.id.startswith(f"{id}-") and row_below.id.endswith(("-kept", "-first")):
            record = (root / "layers" / row_below.id).read_bytes().replace(id.encode(), b"ID")
            content.append((row_below.id.removeprefix(id), record, row_below.sealed))
            content += _tree(root / "diff" / row_below.id)
    return Seen(
        (root / "layers" / id).read_bytes().replace(id.encode(), b"ID"),
        tuple(content),
        row.references,
        os.path.ismount(root / "mnt" / id),
        row.sealed,
    )


def _tree(top: Path) -> Iterator[object]:
    for path in [top, *sorted(top.rglob("*"))]:
        info = path.lstat()
        body: object = info.st_rdev
        if stat.S_ISREG(info.st_mode):
            body = path.read_bytes()
        elif stat.S_ISLNK(info.st_mode):
            body = os.readlink(path)
        xattrs = {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
            if name not in _MARKS
        }
        # a whiteout has no time of its own, and overlayfs links them to each other as it likes
        node = stat.S_ISCHR(info.st_mode) and info.st_rdev == 0
        whiteout = node or path.name.startswith(".wh.")
        links = 0 if whiteout or stat.S_ISDIR(info.st_mode) else info.st_nlink
        yield (
            *(str(path.relative_to(top)), info.st_mode, info.st_uid, info.st_gid, links, body),
            *(0 if whiteout else info.st_mtime_ns, tuple(sorted(xattrs.items()))),
        )


def difference(seen: Seen | None, allowed: Seen | None) -> str:
    """In what a layer is not as it may be."""
    if seen is None or allowed is None:
        return "it is there" if seen else "it is not there"
    parts = [
        f"{name} is {getattr(seen, name)!r}, not {getattr(allowed, name)!r}"
        for name in ("parents", "references", "mounted", "sealed")
        if getattr(seen, name) != getattr(allowed, name)
    ]
    for row in set(seen.content) ^ set(allowed.content):
        parts.append(f"{'too much' if row in seen.content else 'missing'}: {str(row)[:300]}")
    return "; ".join(parts)


def disorder(subject: Subject, client: Client) -> Iterator[str]:
    """What is wrong with the store as a whole."""
    root = subject.root
    if left := settle(subject, client):
        yield f"this is not put right yet: {left}"
    for problem in client.check(deep=True).problems:
        yield f"check: {problem}"
    ids = {row.id for row in client.list(after="", limit=10_000).layers}
    for sub in ("layers", "diff", "mnt"):
        if strange := set(os.listdir(root / sub)) ^ ids:
            yield f"{sub} and the list differ by {strange}"
    if strange := set(os.listdir(root)) - {"layers", "diff", "mnt", ".aufsd"}:
        yield f"the root holds {strange}"
    if strange := set(os.listdir(root / ".aufsd")) - _PRIVATE:
        yield f".aufsd holds {strange}"
    if strange := set(os.listdir(root / ".aufsd/work")) - ids:
        yield f"work directories of no layer: {strange}"
    if quarantined := os.listdir(root / ".aufsd/quarantine"):
        yield f"in quarantine: {quarantined}"
    for path in (root / ".aufsd/work").glob("*/labelled-*"):
        labels = {os.getxattr(each, XATTR) for each in (path, *path.rglob("*"))}
        if len(labels) != 1:
            yield f"{path} is kept, and is labelled {labels}"
    counted = {str(root / "mnt" / row.id) for row in client.mounts().mounts if row.mounted}
    live = {row.mount_point for row in mountinfo.mounted_under(str(root))}
    if live != counted:
        yield f"mounts and the table differ by {live ^ counted}"


def settle(subject: Subject, client: Client) -> list[str]:
    """Give the daemon the time to put right and delete what it has to; what is left then."""
    left: list[str] = []

    def settled() -> bool:
        client.ping()
        left[:] = unsettled(subject.root)
        return not left

    with suppress(AssertionError):
        eventually(settled)
    return left


def unsettled(root: Path) -> list[str]:
    """What the daemon has to put right or delete still."""
    found = [str(path) for name in _EMPTIED for path in (root / ".aufsd" / name).iterdir()]
    for path in (root / "diff").iterdir():
        if "trusted.aufsd.converting" in os.listxattr(path):
            found.append(f"{path} is half converted")
    return found
