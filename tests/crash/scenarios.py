"""The operations that are cut off, each as the steps that it may be found at.

An operation is held to: as before, or as after the last step; one that does two things, each of
them whole, may be found between them.
"""

import os
import shutil
import socket
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aufsd_client import Client
from aufsd_client.wire import (
    READ_SIZE,
    ConnectionLost,
    LineSplitter,
    decode_reply,
    encode_request,
)
from tests.archives import tar

Step = Callable[[Client, str], object]


@dataclass(frozen=True)
class Scenario:
    """`ready` makes what is needed of layer `id`; `act` is the operation; `between` its halves."""

    name: str
    ready: tuple[Step, ...]
    act: Step
    between: tuple[Step, ...] = ()
    # whether a child process does part of it
    archive: bool = False


def populate(client: Client) -> None:
    """What all scenarios stand on."""
    client.create("other")
    client.apply_diff("other", tar({"etc": None, "etc/other": b"o"}))
    client.create("base")
    # with a time for the top directory, which what stands on it takes over
    client.apply_diff(
        "base",
        tar({".": None, "etc": None, "etc/hosts": b"a", "gone": b"b", "d": None, "d/f": b""}),
    )


def _special() -> tarfile.TarInfo:
    info = tarfile.TarInfo("d/fifo")
    info.type, info.mode, info.mtime = tarfile.FIFOTYPE, 0o640, 1_500_000_000
    return info


def _device() -> tarfile.TarInfo:
    info = tarfile.TarInfo("d/null")
    info.type, info.mode, info.mtime = tarfile.CHRTYPE, 0o666, 1_500_000_000
    info.devmajor, info.devminor = 1, 3
    return info


def _link() -> tarfile.TarInfo:
    info = tarfile.TarInfo("d/link")
    info.type, info.linkname = tarfile.LNKTYPE, "d/file"
    return info


def _owned() -> tarfile.TarInfo:
    info = tarfile.TarInfo("d/suid")
    info.mode, info.uid, info.gid, info.mtime = 0o4755, 7, 8, 1_500_000_001
    info.pax_headers = {"SCHILY.xattr.user.note": "kept"}
    return info


FIRST = tar(
    {
        "d": None,
        "d/file": b"x" * 10_000,
        "d/link": _link(),
        "d/fifo": _special(),
        "d/null": _device(),
        "d/suid": _owned(),
        "d/.wh..wh..opq": b"",
        ".wh.gone": b"",
        "symlink": "d/file",
    }
)
SECOND = tar(
    {"d/file": b"y" * 5_000, "d/.wh.fifo": b"", "new": None, "new/file": b"z", ".wh.etc": b""}
)


def _create(client: Client, id: str) -> object:
    return client.create(id, parent="base")


def _first(client: Client, id: str) -> object:
    return client.apply_diff(id, FIRST)


def _second(client: Client, id: str) -> object:
    return client.apply_diff(id, SECOND)


def _to_aufs(client: Client, id: str) -> object:
    return client.convert(id, "aufs")


def _to_overlay(client: Client, id: str) -> object:
    return client.convert(id, "overlay")


def _remove(client: Client, id: str) -> object:
    return client.remove(id)


def _remove_by_force(client: Client, id: str) -> object:
    return client.remove(id, force=True)


def _get(client: Client, id: str) -> object:
    return client.get(id)


def _get_in_one_go(client: Client, id: str) -> object:
    """Three calls that arrive together: one alone, and two that share a write of the journal."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(client.path)
        sock.sendall(b"".join(encode_request(str(n), "get", {"id": id}) for n in range(3)))
        lines = LineSplitter()
        answers: list[bytes] = []
        while len(answers) < 3:
            try:
                data = sock.recv(READ_SIZE)
            except ConnectionResetError:
                data = b""
            if not data:
                raise ConnectionLost("the daemon is gone")
            answers += lines.feed(data)
    for answer in answers:
        if error := decode_reply(answer).error:
            raise error
    return answers


def _seal(client: Client, id: str) -> object:
    return client.seal(id)


def _put(client: Client, id: str) -> object:
    return client.put(id)


KEPT = "-kept"


def _first_kept(client: Client, id: str) -> object:
    return client.checkpoint(id, f"{id}-first")


def _write(client: Client, id: str) -> object:
    """Change it through its mount."""
    path = Path(client.get_metadata(id).metadata["path"])
    shutil.rmtree(path / "etc")
    (path / "new").write_text("new")
    os.chmod(path / "d", 0o700)
    for changed in (path / "new", path):
        os.utime(changed, (1_500_000_000, 1_500_000_000))
    return None


def _checkpoint(client: Client, id: str) -> object:
    return client.checkpoint(id, id + KEPT)


def _rollback(client: Client, id: str) -> object:
    return client.rollback(id)


def _rollback_to(client: Client, id: str) -> object:
    return client.rollback(id, to="other")


def _squash(client: Client, id: str) -> object:
    return client.squash(id, "base")


_SQUASHED = (_create, _get, _first_kept, _write, _put)

SCENARIOS = (
    Scenario("checkpoint", (_create, _first), _checkpoint),
    Scenario("checkpoint of a mounted layer", (_create, _first, _get, _get), _checkpoint),
    Scenario("second checkpoint", (_create, _get, _first_kept, _write), _checkpoint),
    Scenario("checkpoint after a put", (_create, _get, _first_kept, _write, _put), _checkpoint),
    Scenario("rollback", (_create, _first), _rollback),
    Scenario("rollback of a mounted layer", (_create, _first, _get), _rollback),
    Scenario("rollback to another", (_create, _first, _get), _rollback_to),
    Scenario("squash", _SQUASHED, _squash, archive=True),
    Scenario("create", (), _create),
    Scenario("remove", (_create, _first), _remove),
    Scenario("remove by force", (_create, _first, _get), _remove_by_force, between=(_put,)),
    Scenario("apply to an empty layer", (_create,), _first, archive=True),
    Scenario("apply to a full layer", (_create, _first), _second, archive=True),
    # what fails and cannot be brought back either, since the next child is killed as well, is
    # finished in the background instead
    Scenario("convert to aufs", (_create, _first), _to_aufs, (_to_aufs,), archive=True),
    Scenario(
        "convert to overlay",
        (_create, _first, _to_aufs),
        _to_overlay,
        (_to_overlay,),
        archive=True,
    ),
    Scenario("seal", (_create, _first), _seal, archive=True),
    Scenario("get", (_create, _first), _get),
    Scenario("get again", (_create, _first, _get), _get),
    Scenario("get in one go", (_create, _get), _get_in_one_go, between=(_get,)),
    Scenario(
        "get what must be converted",
        (_create, _first, _to_aufs),
        _get,
        between=(_to_overlay,),
        archive=True,
    ),
    Scenario("put", (_create, _first, _get), _put),
    Scenario("put one of two", (_create, _get, _get), _put),
)


# --- snapshots --------------------------------------------------------------------------------

LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


def _own_parent(client: Client, id: str) -> object:
    """One of its own: what is kept of a parent counts for the next child."""
    client.create(f"{id}-base", parent="base")
    return client.apply_diff(f"{id}-base", tar({"etc/more": b"b", "e": None, "e/f": b""}))


def _labelled(client: Client, id: str) -> object:
    return client.create(id, parent=f"{id}-base", mount_label=LABEL)


def _labelled_before(client: Client, id: str) -> object:
    client.create(f"{id}-before", parent=f"{id}-base", mount_label=LABEL)
    return client.remove(f"{id}-before")


SNAPSHOTS = (
    Scenario("create", (), _create),
    Scenario("remove", (_create, _first), _remove),
    Scenario("apply", (_create, _first), _second, archive=True),
    Scenario("seal", (_create, _first), _seal, archive=True),
    Scenario("checkpoint", (_create, _first), _checkpoint),
    Scenario("second checkpoint in use", (_create, _get, _first_kept, _write), _checkpoint),
    Scenario("rollback", (_create, _first), _rollback),
    Scenario("rollback to another in use", (_create, _first, _get), _rollback_to),
    Scenario("squash", _SQUASHED, _squash),
    Scenario("new label", (_own_parent,), _labelled, archive=True),
    Scenario("label to be kept", (_own_parent, _labelled_before), _labelled, archive=True),
    Scenario("kept label", (_own_parent, _labelled_before, _labelled_before), _labelled),
)


def clear(client: Client, id: str) -> None:
    """Take away what a scenario left, so that the store does not grow."""
    for name in (id, id + KEPT, f"{id}-first", f"{id}-before", f"{id}-base"):
        client.remove(name, force=True)
