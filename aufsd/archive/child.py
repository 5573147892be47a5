"""The child process of one archive job: from the request on its socket to the result.

Its parent is the fork server. requests.py says which descriptors come with a request.
"""

import array
import errno
import gc
import os
import socket
import traceback
from collections.abc import Sequence
from typing import NoReturn

from msgspec import UNSET
from msgspec.structs import replace

from aufsd.archive import (
    changes,
    clone,
    compare,
    confine,
    errnos,
    fingerprint,
    measure,
    patience,
    readings,
    relabel,
    requests,
    squash,
    twin,
    view,
)
from aufsd.archive.attributes import inherit
from aufsd.archive.meter import Meter
from aufsd.archive.pack import Packer, pack
from aufsd.archive.reader import Reader
from aufsd.archive.requests import Branch, Settings
from aufsd.archive.sink import Sink
from aufsd.archive.source import Source
from aufsd.archive.unpack import Unpacker
from aufsd.kernel import syscalls
from aufsd.results import Streamed
from aufsd.store.dialect import Dialect
from aufsd.store.walk import Way
from aufsd.union import conversion
from aufsd_client.errors import AufsdError, BadArchive, InternalError, LimitExceeded

_FDS_MAX = 8


def run(channel: socket.socket) -> NoReturn:
    """Do the job that comes on `channel`; the process ends with it."""
    status = 1
    try:
        gc.disable()
        _introduce(channel)
        request, fds = _receive(channel)
        meter = Meter(lambda size, entries: _send(channel, requests.Progress(size, entries)))
        reply = _reply(request, fds, meter)
        # what jobs moved adds up to what metrics says, short ones and failed ones too; in one piece
        # with the reply, for each wakes the daemon
        last = [requests.Progress(meter.bytes, meter.entries)] if meter.entries else []
        _send(channel, *last, reply)
        status = 0
    except Exception:
        # the socket is closed; the daemon's standard error is the log
        traceback.print_exc()
    finally:
        os._exit(status)


def _introduce(channel: socket.socket) -> None:
    """Send the daemon a pidfd, by which it can kill this process and no other."""
    pidfd = os.pidfd_open(os.getpid())
    line = requests.encode(requests.Started()) + b"\n"
    channel.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))])
    os.close(pidfd)


def _receive(channel: socket.socket) -> tuple[requests.Request, list[int]]:
    try:
        data, fds, _, _ = socket.recv_fds(channel, 1 << 16, _FDS_MAX)
    except ConnectionResetError:
        # given up by the daemon before there was a request
        os._exit(1)
    while not data.endswith(b"\n"):
        more = channel.recv(1 << 16)
        if not more:
            os._exit(1)
        data += more
    return requests.decode_request(data), list(fds)


def _send(channel: socket.socket, *replies: requests.Reply) -> None:
    try:
        channel.sendall(b"".join(requests.encode(reply) + b"\n" for reply in replies))
    except BrokenPipeError:
        # nobody waits for it any more
        os._exit(1)


def _reply(
    request: requests.Request, fds: list[int], meter: Meter
) -> requests.Result | requests.Failed:
    try:
        return perform(request, fds, meter)
    except AufsdError as error:
        return requests.Failed(error.to_wire())
    except OSError as error:
        if error.errno == errno.EMFILE:
            long = "the chain is too long for the descriptors of a process"
            return requests.Failed(LimitExceeded(long).to_wire())
        answer = errnos.answer(error)
        # BadArchive only for a job that reads an archive
        if answer is None or (
            isinstance(answer, BadArchive) and not isinstance(request.work, requests.Apply)
        ):
            return _unexpected(error)
        return requests.Failed(answer.to_wire())
    except MemoryError:
        large = "it takes more memory than an archive process may have"
        return requests.Failed(LimitExceeded(large).to_wire())
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> requests.Failed:
    text = "".join(traceback.format_exception(error))
    made = InternalError(f"the archive job failed: {error}", traceback=text)
    return requests.Failed(made.to_wire())


def perform(request: requests.Request, fds: list[int], meter: Meter) -> requests.Result:
    """Confine this process to what the job needs, and do it."""
    settings = request.settings
    match request.work:
        case requests.Diff():
            with patience.limited(meter, settings.stream_timeout):
                return _diff(request.work, fds, settings, meter)
        case requests.Apply():
            with patience.limited(meter, settings.stream_timeout):
                return _apply(request.work, fds, settings, meter)
        case requests.Compare(chain, against, after, limit):
            now, then = _views(settings, fds[0], chain, against)
            return requests.Compared(changes.changes(now, then, settings, after=after, limit=limit))
        case requests.Measure(chain, None):
            layer = _own(settings, fds[0], chain[0])
            return requests.Measured(measure.measure(aufs=layer.marks.aufs).bytes)
        case requests.Measure(chain, against):
            now, then = _views(settings, fds[0], chain, against or ())
            return requests.Measured(compare.size(now, then, settings))
        case requests.Usage():
            return _usage(request.work, fds[0], settings)
        case requests.Read(chain):
            confine.enter(fds[0], read_only=True)
            # xattrs that a layer should not have are looked for too
            _drop(settings, confine.READING, trusted=True)
            return requests.Reading(readings.look_into(_here(), chain, settings.namespace))
        case requests.Fingerprint(branch):
            layer = _own(settings, fds[0], branch)
            return requests.Fingerprinted(fingerprint.fingerprint(layer, settings, meter))
        case requests.Clone(source, staging):
            confine.enter(fds[0], read_only=False)
            _drop(settings, confine.WRITING, trusted=True)
            clone.clone(source, staging, settings.namespace)
            return requests.Cloned()
        case requests.Squash():
            return _squash(request.work, fds[0], settings, meter)
        case requests.Convert():
            return _convert(request.work, fds, settings)
        case requests.Relabel(label):
            confine.enter(fds[0], read_only=False)
            # security.* of another's file (cap_inode_setxattr(), selinux_inode_setxattr())
            confine.drop(confine.LABELLING, open_files=settings.limits.open_files)
            inodes = relabel.relabel(label)
            if settings.sync == "filesystem":
                syscalls.syncfs(_here())
            return requests.Relabelled(inodes)


def _diff(work: requests.Diff, fds: list[int], settings: Settings, meter: Meter) -> requests.Packed:
    root, out = fds
    sink = Sink(out, meter, digest=work.digest)
    packer = Packer(sink, settings, meter)
    if work.against is None:
        pack(packer, _own(settings, root, work.chain[0]))
    else:
        now, then = _views(settings, root, work.chain, work.against)
        compare.pack(packer, now, then, settings)
    # what goes out is not compressed
    return _packed(meter, meter.bytes, sink.digest(), sink.digest())


def _apply(
    work: requests.Apply, fds: list[int], settings: Settings, meter: Meter
) -> requests.Packed:
    root, branches, stream = fds
    own, *parents = work.chain
    below = confine.enter(root, read_only=False, branches=branches)
    assert below is not None
    trusted = any(branch.dialect is Dialect.OVERLAY for branch in work.chain)
    _drop(settings, confine.WRITING, trusted=trusted)
    lower = _Parents(below, parents, settings)
    source = Source(stream, meter, digest=work.digest)
    reader = Reader(source, meter)
    unpacker = Unpacker(
        reader,
        own.dialect,
        settings,
        meter,
        lower.inherit,
        lower.lies_below if parents else None,
    )
    size = unpacker.run()
    layer = view.Layer(own, _here(), settings.namespace)
    found = fingerprint.of_new(layer, settings, unpacker.memory)
    if settings.sync == "filesystem":
        syscalls.syncfs(_here())
    packed = _packed(meter, size, source.digest(), source.diff_id(), found)
    return replace(packed, settled=bool(parents) and unpacker.settled)


def _usage(work: requests.Usage, root: int, settings: Settings) -> requests.Used:
    if work.against is None:
        layer = _own(settings, root, work.chain[0])
        _sync_if(work.sync, settings)
        used = measure.used(aufs=layer.marks.aufs)
    else:
        now, then = _views(settings, root, work.chain, work.against)
        _sync_if(work.sync, settings)
        used = compare.used(now, then, settings)
    return requests.Used(used.size, used.inodes)


def _sync_if(wanted: bool, settings: Settings) -> None:
    """Have the file system of the content on the disk, if that is wanted and the policy."""
    if wanted and settings.sync == "filesystem":
        syscalls.syncfs(_here())


def _squash(work: requests.Squash, root: int, settings: Settings, meter: Meter) -> requests.Cloned:
    confine.enter(root, read_only=False)
    _drop(settings, confine.WRITING, trusted=True)
    squash.squash(
        work.chain,
        work.below,
        work.kept,
        work.staging,
        work.to,
        settings.namespace,
        meter,
        roots_hide=work.roots_hide,
    )
    if settings.sync == "filesystem":
        syscalls.syncfs(_here())
    return requests.Cloned()


def _convert(work: requests.Convert, fds: list[int], settings: Settings) -> requests.Converted:
    branches = None if work.parents is None else fds[1]
    below = confine.enter(fds[0], read_only=False, branches=branches)
    _drop(settings, confine.WRITING, trusted=True)
    lower = None if below is None else _Parents(below, work.parents or (), settings)
    sync = settings.sync == "filesystem"
    lies_below = lower.lies_below if lower else None
    done = conversion.convert(
        _here(), work.to, settings.namespace, sync=sync, lies_below=lies_below
    )
    return requests.Converted(done)


class _Parents:
    """The merged view of what lies below a layer, opened when it is first asked for."""

    def __init__(self, below: int, chain: Sequence[Branch], settings: Settings) -> None:
        self._below = below
        self._chain = chain
        self._namespace = settings.namespace
        # most archives name every directory and delete nothing: then it is never asked for
        self._cursor: view.Cursor | None = None

    def inherit(self, way: Way) -> bool:
        """Give the current directory the attributes of the directory that is there; or False."""
        found = self._find(way)
        if found:
            inherit(found[0].fd)
        return bool(found)

    def lies_below(self, way: Way) -> bool:
        """Whether there is such a directory."""
        return bool(self._find(way))

    def _find(self, way: Way) -> Sequence[view.Place]:
        if self._cursor is None:
            self._cursor = view.Cursor(view.roots(self._below, self._chain, self._namespace))
        return self._cursor.find(way)


def _packed(
    meter: Meter, size: int, digest: str | None, diff_id: str | None, fingerprint: str = ""
) -> requests.Packed:
    streamed = Streamed(
        size,
        meter.entries,
        meter.warnings(),
        UNSET if digest is None else digest,
        UNSET if diff_id is None else diff_id,
    )
    return requests.Packed(streamed, fingerprint)


def _own(settings: Settings, root: int, branch: Branch) -> view.Layer:
    """Confine this process to one layer's content; how that is read."""
    confine.enter(root, read_only=True)
    layer = view.Layer(branch, _here(), settings.namespace)
    _drop(settings, confine.READING, trusted=layer.marks.overlay)
    return layer


def _views(
    settings: Settings, store: int, chain: Sequence[Branch], against: Sequence[Branch]
) -> tuple[list[view.Place], list[view.Place]]:
    """Confine this process to the branches; the roots of two merged views of them."""
    confine.enter(store, read_only=True)
    here = _here()
    now = view.roots(here, chain, settings.namespace, beside=len(against))
    then = view.roots(here, against, settings.namespace, beside=len(chain))
    if len(now) == len(then) == 1 and now[0].layer.whole and then[0].layer.whole:
        now[0].layer.twin = twin.find(now[0].fd, then[0].fd, settings.namespace)
    overlay = any(place.layer.marks.overlay for place in (*now, *then))
    _drop(settings, confine.READING, trusted=overlay)
    return now, then


def _drop(settings: Settings, keep: frozenset[int], *, trusted: bool) -> None:
    """Give up privileges. `trusted`: overlayfs's marks are to be read or written."""
    if trusted and settings.namespace == "trusted":
        keep |= confine.TRUSTED_XATTRS
    confine.drop(keep, open_files=settings.limits.open_files)


def _here() -> int:
    """The directory that is this process's root now."""
    return os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
