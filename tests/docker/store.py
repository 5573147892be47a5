"""A store that Docker left behind, and what its layers must show; shares no code with aufsd.

tests/data/docker-aufs/README.md says how it was made. `views` is what aufs itself shows,
`views-strict` what Docker and OCI mean, for the layers where the two differ.
"""

import base64
import hashlib
import json
import os
import stat
import tarfile
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from tests.archives import unpack_xz

DATA = Path(__file__).parent.parent / "data/docker-aufs"
LAYERS: dict[str, Any] = json.loads((DATA / "layers.json").read_text())["layers"]
# parents before children
ORDERED = sorted(LAYERS, key=lambda id: (len(LAYERS[id]["parents"]), id))
DIFFERENT = {id: LAYERS[id]["strict_differs"] for id in ORDERED if "strict_view" in LAYERS[id]}

Record = dict[str, Any]
View = dict[str, Record]


def label(id: str) -> str:
    """How a layer is called in a test's name."""
    return f"{LAYERS[id]['kind']}-{id[:8]}"


def unpack(directory: Path) -> Path:
    """The store as it was in /var/lib/docker; its root."""
    unpack_xz(DATA / "aufs-root.tar.xz", directory)
    return directory / "aufs"


@cache
def _views() -> dict[str, bytes]:
    with tarfile.open(DATA / "views.tar.xz") as archive:
        return {
            member.name: found.read()
            for member in archive
            if (found := archive.extractfile(member)) is not None
        }


def expected(id: str, *, strict: bool) -> View:
    """The merged view that a layer must have, by path."""
    kind = "views-strict" if strict and id in DIFFERENT else "views"
    lines = _views()[f"{kind}/{id}.jsonl"].splitlines()
    return {path_of(record): record for record in map(json.loads, lines)}


def path_of(record: Record) -> str:
    """A record's path; one that is not UTF-8 with surrogates."""
    if "path_b64" in record:
        return os.fsdecode(base64.b64decode(record["path_b64"]))
    return str(record["path"])


def seen(root: str) -> View:
    """The tree at `root` in the form of the expected views."""
    found: View = {}
    names: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    pending = [b"."]
    while pending:
        path = pending.pop()
        full = os.path.join(os.fsencode(root), path)
        status = os.lstat(full)
        found[os.fsdecode(path)] = _record(path, full, status)
        if stat.S_ISDIR(status.st_mode):
            below = b"" if path == b"." else path + b"/"
            pending += [below + name for name in os.listdir(full)]
        else:
            names[status.st_dev, status.st_ino].append(path)
    for paths in names.values():
        if len(paths) > 1:
            for path in paths:
                found[os.fsdecode(path)] |= _text("hardlink", min(paths))
    return found


def _record(path: bytes, full: bytes, status: os.stat_result) -> Record:
    mode = status.st_mode
    record = _text("path", path) | {
        "type": _TYPES[stat.S_IFMT(mode)],
        "mode": f"{stat.S_IMODE(mode):04o}",
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime": status.st_mtime_ns // 1_000_000_000,
    }
    if stat.S_ISREG(mode):
        record |= {
            "size": status.st_size,
            "sha256": hashlib.sha256(Path(os.fsdecode(full)).read_bytes()).hexdigest(),
        }
    elif stat.S_ISLNK(mode):
        record |= _text("target", os.readlink(full))
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        record["rdev"] = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    xattrs = {
        name: base64.b64encode(os.getxattr(full, name, follow_symlinks=False)).decode()
        for name in os.listxattr(full, follow_symlinks=False)
        if name == "security.capability" or name.startswith("user.")
    }
    return record | ({"xattrs": xattrs} if xattrs else {})


_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}


def _text(name: str, value: bytes) -> Record:
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_b64": base64.b64encode(value).decode()}
