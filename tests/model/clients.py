"""The calls of a model test over a real daemon, made, and written down with answer and time."""

import errno
import io
import json
import os
import socket
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from math import inf

from aufsd.kernel import syscalls
from aufsd_client import Client, calls
from aufsd_client.errors import AufsdError
from aufsd_client.results import Reference
from aufsd_client.wire import ConnectionLost, DaemonUnreachable, encode_request
from tests.daemon import Daemon
from tests.model import world
from tests.model.explain import Event
from tests.model.world import ABSENT, DONE, GONE, READ_ONLY, THERE, UNKNOWN, Answer, Call

# connects, takes references that go with their process, and waits to be killed
_HOLDER = """
import socket, sys
peer = socket.socket(fileno=int(sys.argv[1]))
peer.connect(sys.argv[2])
peer.sendall(sys.argv[3].encode())
print(flush=True)
sys.stdin.read()
"""


@dataclass
class Record:
    """What happened so far, by whoever did it; appended to by many threads."""

    ids: tuple[str, ...]
    events: list[Event] = field(default_factory=list)

    def note(self, call: Call, answer: Answer, began: float, client: int) -> None:
        """Write down a call that has just ended; one that was cut off has no end."""
        ended = inf if answer == UNKNOWN else time.monotonic()
        if call.method == "cleanup" and (answer == UNKNOWN or isinstance(answer, dict)):
            # it goes from layer to layer, and each of them is taken down in one go
            for id in self.ids if answer == UNKNOWN else answer:
                one = Call("take_down", id)
                said = answer[id] if isinstance(answer, dict) else UNKNOWN
                self.events.append(Event(one, said, began, ended, client))
            return
        if call.method == "create" and answer in (UNKNOWN, world.NO_SPACE):
            # it is listed from when it begins, and may not come to its end
            for step in (call, call._replace(method="undo_create")):
                self.events.append(Event(step, UNKNOWN, began, ended, client))
        if answer == world.NO_SPACE and call.method == "create":
            return
        if call.method == "remove" and call.force:
            # the references go first, and the layer after the mount
            self.events.append(Event(Call("let_go", call.id), UNKNOWN, began, ended, client))
        self.events.append(Event(call, answer, began, ended, client))


@dataclass
class Place:
    """A directory that a client was given, and which one that was."""

    path: str
    inode: int
    device: int
    mounted: bool


@dataclass
class Worker:
    """One client: makes a call and notes what came of it."""

    daemon: Daemon
    record: Record
    number: int
    client: Client = field(init=False)
    places: dict[str, Place] = field(default_factory=dict)

    # the mount that the store lies on
    below: str = field(init=False)

    def __post_init__(self) -> None:
        self.client = self.daemon.client(timeout=120)
        fd = os.open(self.daemon.root, os.O_RDONLY | os.O_DIRECTORY)
        self.below = _mount_id(fd)
        os.close(fd)

    def make(self, call: Call) -> Answer:
        """Make the call. UNKNOWN is its answer if the daemon ends before it gives one."""
        began = time.monotonic()
        try:
            answer = _DO[call.method](self, call)
        except (ConnectionLost, DaemonUnreachable):
            answer = UNKNOWN
        except AufsdError as error:
            answer = type(error).__name__
            if error.code == -32603:
                answer = f"{answer}: {error}"
        self.record.note(call, answer, began, self.number)
        return answer

    def inside(self, call: Call, do: Callable[[int], Answer]) -> Answer:
        """Do something in the place that is held, if what is there is still what was given."""
        place = self.places.get(call.id)
        if place is None:
            return GONE
        try:
            fd = os.open(place.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return GONE
        try:
            found = os.fstat(fd)
            if (found.st_ino, found.st_dev) != (place.inode, place.device):
                return GONE
            # what is left after an unmount is the directory that was mounted on
            if place.mounted and _mount_id(fd) == self.below:
                return GONE
            return do(fd)
        except FileNotFoundError:
            return ABSENT if os.fstat(fd).st_nlink else GONE
        except FileExistsError:
            return THERE
        except OSError as error:
            if error.errno == errno.EROFS:
                return READ_ONLY
            if error.errno == errno.ENOSPC:
                return world.NO_SPACE
            raise
        finally:
            os.close(fd)


def _mount_id(fd: int) -> str:
    """Which mount an open directory lies on (proc_pid_fdinfo(5))."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return next(line for line in file if line.startswith("mnt_id"))


def _get(worker: Worker, call: Call) -> Answer:
    name = call.hold.removeprefix("name:")
    got = worker.client.get(call.id, name=name)
    try:
        found = os.stat(got.path)
        worker.places[call.id] = Place(got.path, found.st_ino, found.st_dev, got.mounted)
    except OSError:
        worker.places.pop(call.id, None)
    return ("got", got.references, got.mounted, got.read_only, got.new)


def _put(worker: Worker, call: Call) -> Answer:
    put = worker.client.put(call.id, name=call.hold.removeprefix("name:"))
    return ("left", put.references, put.mounted, put.dropped)


def _create(worker: Worker, call: Call) -> Answer:
    worker.client.create(call.id, parent=call.parent)
    return DONE


def _remove(worker: Worker, call: Call) -> Answer:
    found = worker.client.remove(call.id, force=call.force, in_use_ok=True)
    if found.removed:
        return ("removed",)
    return (found.reason,) if found.reason == "not-found" else (found.reason, found.references)


def archive(rows: tuple[tuple[str, int | None], ...]) -> bytes:
    """A tar that says these."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        for name, token in rows:
            if token is None:
                made.addfile(tarfile.TarInfo(f".wh.{name}"))
                continue
            info = tarfile.TarInfo(name)
            data = f"{token}\n".encode().ljust(world.size_of(token), b".")
            info.size, info.mtime = len(data), 1_500_000_000 + token
            made.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _apply(worker: Worker, call: Call) -> Answer:
    return ("applied", worker.client.apply_diff(call.id, archive(call.tar)).size)


def _diff(worker: Worker, call: Call) -> Answer:
    out = bytearray()
    worker.client.diff(call.id, out, parent=call.parent)
    found: set[tuple[str, int | None]] = set()
    with tarfile.open(fileobj=io.BytesIO(bytes(out))) as stream:
        for member in stream:
            if member.name.startswith(".wh."):
                found.add((member.name.removeprefix(".wh."), None))
            elif member.issym():
                found.add((member.name, int(member.linkname)))
            elif member.isfile():
                file = stream.extractfile(member)
                assert file is not None
                found.add((member.name, int(file.read().split(b"\n")[0])))
    return frozenset(found)


def _changes(worker: Worker, call: Call) -> Answer:
    page = worker.client.changes(call.id, parent=call.parent)
    return frozenset(
        (str(each.path).removeprefix("/"), each.kind) for each in page.changes if each.path != "/"
    )


def _list(worker: Worker, _: Call) -> Answer:
    rows = worker.client.list().layers
    return frozenset((row.id, (row.parent, row.depth, row.references, row.mounted)) for row in rows)


def _held(reference: Reference) -> str:
    if reference.name:
        return f"name:{reference.name}"
    return f"pid:{reference.pid}" if reference.hold == "process" else world.ANONYMOUS


def _mounts(worker: Worker, _: Call) -> Answer:
    return frozenset(
        (row.id, (tuple(sorted(map(_held, row.holders))), row.read_only, row.mounted))
        for row in worker.client.mounts().mounts
    )


def _get_metadata(worker: Worker, call: Call) -> Answer:
    found = worker.client.get_metadata(call.id).metadata
    return (found["parents"], int(found["references"]), found["mounted"] == "true")


def _cleanup(worker: Worker, _: Call) -> Answer:
    found = worker.client.cleanup()
    if found.failed:
        return f"failed: {found.failed}"
    return {id: id in found.unmounted for id in {*worker.record.ids, *found.unmounted}}


def _check(worker: Worker, _: Call) -> Answer:
    return frozenset(
        (each.id, each.problem, each.detail) for each in worker.client.check().problems
    )


def _content(worker: Worker, call: Call) -> Answer:
    path = worker.daemon.root / "diff" / call.id
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return frozenset((name, _token(fd, name)) for name in os.listdir(fd))
    finally:
        os.close(fd)


def _kernel(worker: Worker, _: Call) -> Answer:
    return frozenset(worker.daemon.mounts())


def _outside(worker: Worker, call: Call) -> Answer:
    try:
        syscalls.umount2(str(worker.daemon.root / "mnt" / call.id), 0)
    except OSError as error:
        return "busy" if error.errno == errno.EBUSY else ABSENT
    return DONE


def _look(worker: Worker, call: Call) -> Answer:
    return worker.inside(
        call, lambda fd: frozenset(each.removeprefix(".wh.") for each in os.listdir(fd))
    )


def _read(worker: Worker, call: Call) -> Answer:
    return worker.inside(call, lambda fd: _token(fd, call.name))


def _token(directory: int, name: str) -> Answer:
    """What a name in a directory holds."""
    try:
        return int(os.readlink(name, dir_fd=directory))
    except OSError as error:
        if error.errno != errno.EINVAL:  # no symlink
            raise
    # a whiteout that hides nothing: in a layer without parents it is shown as it lies there
    if not stat.S_ISREG(os.stat(name, dir_fd=directory).st_mode):
        return ABSENT
    with open(os.open(name, os.O_RDONLY, dir_fd=directory)) as file:
        return int(file.readline())


def _link(worker: Worker, call: Call) -> Answer:
    def link(fd: int) -> Answer:
        os.symlink(str(call.token), call.name, dir_fd=fd)
        return DONE

    return worker.inside(call, link)


def _unlink(worker: Worker, call: Call) -> Answer:
    def unlink(fd: int) -> Answer:
        os.unlink(call.name, dir_fd=fd)
        return DONE

    return worker.inside(call, unlink)


def _abandon(worker: Worker, request: calls.Request[object], fd: int) -> None:
    """Send a call, and go away without the answer."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(worker.daemon.socket)
        frame = encode_request("1", request.method, request.params)
        socket.send_fds(peer, [frame], [fd])


def abandon(worker: Worker, call: Call) -> None:
    """Make a call whose client is gone before it is answered."""
    began = time.monotonic()
    read, write = os.pipe()
    try:
        if call.method == "apply_diff":
            os.write(write, archive(call.tar))
            os.close(write)
            write = -1
            _abandon(worker, calls.apply_diff(call.id), read)  # type: ignore[arg-type]
        else:
            _abandon(worker, calls.diff(call.id, parent=call.parent), write)  # type: ignore[arg-type]
    except OSError:
        pass  # the daemon is gone
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)
    worker.record.note(call, UNKNOWN, began, worker.number)


def hold_and_die(worker: Worker, ids: list[str], replies: int) -> None:
    """A process asks for references, and is killed after so many replies; the daemon notices.

    Its socket is ours too, so that all replies are known, those after its death as well.
    """
    lines = [
        encode_request(f"{at}", "get", {"id": id, "hold": "process"}) for at, id in enumerate(ids)
    ]
    began = died = time.monotonic()
    with socket.socket(socket.AF_UNIX) as peer:
        words = (str(peer.fileno()), worker.daemon.socket, b"".join(lines).decode())
        with subprocess.Popen(
            [sys.executable, "-IS", "-c", _HOLDER, *words],
            pass_fds=[peer.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            hold = f"pid:{process.pid}"
            waiting = {f"{at}": Call("get", id, hold=hold) for at, id in enumerate(ids)}
            assert process.stdout is not None
            if not process.stdout.readline():
                return  # the daemon is gone

            def read(most: int) -> None:
                for line in islice(stream, most):
                    call = waiting.pop(json.loads(line)["id"])
                    worker.record.note(call, _replied(line), began, worker.number)

            with peer.makefile("rb") as stream, suppress(ConnectionResetError, BrokenPipeError):
                read(replies)
                died = time.monotonic()
                process.kill()
                peer.shutdown(socket.SHUT_WR)
                read(len(ids))
            process.kill()
    for call in waiting.values():
        worker.record.note(call, UNKNOWN, began, worker.number)
    # what is counted for it after its end goes as well, each by itself
    for id in ids:
        worker.record.events.append(Event(Call("death", id, hold=hold), DONE, died, inf))


def _replied(line: bytes) -> Answer:
    """The answer of a `get` as it came over the socket."""
    found = json.loads(line)
    if "error" in found:
        return str(found["error"]["data"]["name"])
    got = found["result"]
    return ("got", got["references"], got["mounted"], got["read_only"], got["new"])


_DO: Mapping[str, Callable[[Worker, Call], Answer]] = {
    "exists": lambda worker, call: worker.client.exists(call.id).exists,
    "create": _create,
    "remove": _remove,
    "get": _get,
    "put": _put,
    "cleanup": _cleanup,
    "outside": _outside,
    "apply_diff": _apply,
    "diff": _diff,
    "changes": _changes,
    "diff_size": lambda worker, call: worker.client.diff_size(call.id, parent=call.parent).size,
    "look": _look,
    "read": _read,
    "link": _link,
    "unlink": _unlink,
    "list": _list,
    "mounts": _mounts,
    "get_metadata": _get_metadata,
    "check": _check,
    "content": _content,
    "kernel": _kernel,
}
