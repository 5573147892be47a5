"""Compares the merged views of two chains by reading the branches, without a mount.

A name can differ only if it occurs in a branch that only one of the two chains has. So the names of
these branches are listed, and looked up in the other branches. The time depends on the size of the
layers that differ, and not on that of their common parents.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from aufsd.archive import view
from aufsd.archive.attributes import carried
from aufsd.archive.compact import AT_A_TIME, Ordered, Seen, in_order, once
from aufsd.archive.measure import UNIT, Used, is_first
from aufsd.archive.meter import shown
from aufsd.archive.pack import (
    Inspected,
    Packer,
    pack_file,
    pack_other,
    read_link,
)
from aufsd.archive.requests import Settings
from aufsd.archive.view import GONE, Found, Place, ascend
from aufsd.store import whiteouts
from aufsd.store.walk import Way

_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CHUNK: Final = 1 << 20

Kind: TypeAlias = Literal["add", "modify", "delete", "same"]


class Event(NamedTuple):
    """A name that differs, or ("same") a directory in which a name may differ.

    `now` is what the first chain has there; `fd` its topmost directory, if it is one. With `below`
    the events of what it holds follow, up to a `Leave`. `passed`: it leads to where the list is to
    begin, or is that itself.
    """

    kind: Kind
    way: Way
    now: Found | None
    fd: int
    below: bool
    passed: bool


class Leave(NamedTuple):
    """The end of the events of a directory."""


class _Frame(NamedTuple):
    way: Way
    now: list[Place]
    then: list[Place]
    names: Iterator[bytes]
    # the component of the cursor that lies in this directory; empty if it lies elsewhere
    cursor: bytes


def _ignore(way: Way, error: OSError) -> None:
    """What goes away while it is read is listed as if it had never been there."""
    if error.errno not in GONE:
        raise error


def events(
    now: list[Place],
    then: list[Place],
    settings: Settings,
    *,
    after: Sequence[bytes] = (),
    vanished: Callable[[Way, OSError], None] = _ignore,
) -> Iterator[Event | Leave]:
    """Everything that differs between two merged roots, sorted, parents before children.

    `after` are the components of a path: it and what sorts before it is left out, but not the
    directories above it ("same"). What an event holds is open until the next one is asked for.
    `vanished` is told of errors, and raises those that are none of a layer in use.
    """
    frames = [_frame(Way(None, b""), now, then, after[0] if after else b"")]
    while True:
        frame = frames[-1]
        for name in frame.names:
            try:
                seen = _look(frame, name, settings)
            except OSError as error:
                vanished(Way(frame.way, name), error)
                continue
            passed = name == frame.cursor
            if not seen.below:
                if seen.kind != "same" and not passed:
                    way = Way(frame.way, name)
                    yield Event(seen.kind, way, seen.found, -1, below=False, passed=False)
                continue
            if seen.kind == "same" and (seen.twins or _ids(seen.below) == _ids(seen.under)):
                yield from _up(frames, seen.below, seen.under)
                break
            way = Way(frame.way, name)
            kind = "same" if passed else seen.kind
            yield Event(kind, way, seen.found, seen.below[0].fd, below=True, passed=passed)
            cursor = after[len(frames)] if passed and len(frames) < len(after) else b""
            frames.append(_frame(way, seen.below, seen.under, cursor))
            break
        else:
            frames.pop()
            if not frames:
                return
            yield Leave()
            yield from _up(frames, frame.now, frame.then)


def _up(frames: list[_Frame], now: Sequence[Place], then: Sequence[Place]) -> Iterator[Leave]:
    """Go up to the last frame. If directories were moved meanwhile, it ends, and those above it, up
    to one that is still in its place."""
    while ascend((*now, *then), len(frames) - 1) < len(frames) - 1:
        _, now, then, _, _ = frames.pop()
        yield Leave()


class _Seen(NamedTuple):
    """A name in both views: `below` and `under` are its directories, if it is one there.

    `twins`: it is a directory that is known to be one in both, with all that is in it.
    """

    kind: Kind
    found: Found | None
    below: list[Place]
    under: list[Place]
    twins: bool


def _look(frame: _Frame, name: bytes, settings: Settings) -> _Seen:
    found = view.lookup(frame.now, name)
    before = view.lookup(frame.then, name)
    kind = _kind(name, found, before, settings)
    if found is None or not stat.S_ISDIR(found.stat.st_mode):
        return _Seen(kind, found, [], [], False)
    below = view.descend(frame.now, name, found)
    if not below:
        raise FileNotFoundError(errno.ENOENT, "the directory went away")
    under = []
    if before is not None and stat.S_ISDIR(before.stat.st_mode):
        try:
            under = view.descend(frame.then, name, before)
        except BaseException:
            ascend(below, frame.now[0].depth - 1)
            raise
    return _Seen(kind, found, below, under, _twins(found, before, below=True))


def _frame(way: Way, now: list[Place], then: list[Place], cursor: bytes) -> _Frame:
    shared = 0
    for mine, other in zip(reversed(now), reversed(then), strict=False):
        if mine.layer.id != other.layer.id:
            break
        shared += 1
    own = (*now[: len(now) - shared], *then[: len(then) - shared])
    found = Ordered()
    some: list[bytes] = []
    for place in own:
        for name in _mentioned(place):
            if name >= cursor:
                some.append(name)
                if len(some) >= AT_A_TIME:
                    found.add_all(some)
    return _Frame(way, now, then, once(in_order(found, some)), cursor)


def _mentioned(place: Place) -> Iterator[bytes]:
    """The names that a directory of a branch says something about."""
    aufs = place.layer.marks.aufs
    with os.scandir(place.fd) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            if aufs and name.startswith(whiteouts.WHITEOUT):
                deleted = whiteouts.deleted_name(name)
                if deleted is not None:
                    yield deleted
            else:
                yield name


def _ids(places: Sequence[Place]) -> list[str]:
    return [place.layer.id for place in places]


# --- one name ---------------------------------------------------------------------------------


def _kind(name: bytes, now: Found | None, then: Found | None, settings: Settings) -> Kind:
    if now is None:
        return "same" if then is None else "delete"
    if then is None:
        return "add"
    if now.place.layer.id == then.place.layer.id or _twins(now, then):
        return "same"
    return "modify" if _differs(name, now, then, settings) else "same"


def _twins(now: Found, then: Found | None, *, below: bool = False) -> bool:
    """Whether the two are known to be one, of a snapshot and its parent; and all `below` them."""
    twin = now.place.layer.twin
    if twin is None or then is None:
        return False
    return twin.same_below(now.stat, then.stat) if below else twin.same(now.stat, then.stat)


def root_differs(now: Place, then: Place, settings: Settings) -> bool:
    """Whether the root directories themselves differ."""
    if now.layer.id == then.layer.id:
        return False
    a, b = os.fstat(now.fd), os.fstat(then.fd)
    if (a.st_mode, a.st_uid, a.st_gid) != (b.st_mode, b.st_uid, b.st_gid):
        return True
    return carried(now.fd, settings, os.listxattr(now.fd)) != carried(
        then.fd, settings, os.listxattr(then.fd)
    )


def _differs(name: bytes, now: Found, then: Found, settings: Settings) -> bool:
    a, b = now.stat, then.stat
    if (a.st_mode, a.st_uid, a.st_gid) != (b.st_mode, b.st_uid, b.st_gid):
        return True
    if stat.S_ISDIR(a.st_mode):
        # the time of a directory changes with what it holds, which is listed itself
        return _attributes(name, now, settings) != _attributes(name, then, settings)
    if a.st_rdev != b.st_rdev or not _same_time(a.st_mtime_ns, b.st_mtime_ns):
        return True
    if stat.S_ISLNK(a.st_mode):
        return _target(name, now) != _target(name, then)
    if not stat.S_ISREG(a.st_mode):
        return False
    if a.st_size != b.st_size:
        return True
    if _attributes(name, now, settings) != _attributes(name, then, settings):
        return True
    # builds that set every time to one date make files that differ in nothing but this
    return not _same_content(name, now, then)


def _same_time(a: int, b: int) -> bool:
    """An archive keeps whole seconds, so a time without a fraction stands for its whole second."""
    if a == b:
        return True
    seconds, other = a // 1_000_000_000, b // 1_000_000_000
    return seconds == other and 0 in (a % 1_000_000_000, b % 1_000_000_000)


def _target(name: bytes, found: Found) -> bytes:
    return read_link(name, found.place.fd)


def _attributes(name: bytes, found: Found, settings: Settings) -> dict[str, bytes]:
    fd = os.open(name, _FILE, dir_fd=found.place.fd)
    try:
        return carried(fd, settings, os.listxattr(fd))
    finally:
        os.close(fd)


def _same_content(name: bytes, now: Found, then: Found) -> bool:
    mine = os.open(name, _FILE, dir_fd=now.place.fd)
    other = os.open(name, _FILE, dir_fd=then.place.fd)
    try:
        while True:
            a, b = os.read(mine, _CHUNK), os.read(other, _CHUNK)
            if a != b:
                return False
            if not a:
                return True
    finally:
        os.close(mine)
        os.close(other)


# --- as a tar, as a size ----------------------------------------------------------------------


def pack(packer: Packer, now: list[Place], then: list[Place], settings: Settings) -> None:
    """Write what turns the view `then` into `now`: a layer of it over the one gives the other."""
    packer.directory(b".", packer.inspect(now[0].fd, now[0].layer))
    # directories that are not written yet: they are once something in them is
    unwritten: list[tuple[Way, Inspected]] = []
    # the directory of the last entry, and its path
    above, prefix = None, b""
    # how deep we are below a name that no archive can hold
    unsaid = 0

    def vanished(way: Way, error: OSError) -> None:
        packer.vanished(way.path(), error)

    for event in events(now, then, settings, vanished=vanished):
        if isinstance(event, Leave):
            if unsaid:
                unsaid -= 1
            elif unwritten:
                # those that are written lie above it
                unwritten.pop()
            continue
        if unsaid or event.way.name.startswith(whiteouts.WHITEOUT):
            if not unsaid:
                packer.meter.warn(
                    f"left out {shown(event.way.path())}: an archive cannot hold such a name"
                )
            unsaid += event.below
            continue
        if event.kind == "same":
            assert event.now is not None
            unwritten.append((event.way, packer.inspect(event.fd, event.now.place.layer)))
            continue
        for way, inspected in unwritten:
            packer.directory(way.path(), inspected)
        unwritten.clear()
        if event.way.above is not above:
            above = event.way.above
            assert above is not None
            prefix = above.path() + b"/" if above.size else b""
        _write(packer, event, prefix)
    packer.finish()


def _write(packer: Packer, event: Event, prefix: bytes) -> None:
    name, above = event.way.name, event.way.above
    assert above is not None
    if event.now is None:
        packer.whiteout(prefix + whiteouts.WHITEOUT + name)
        return
    path = prefix + name
    mode, at = event.now.stat.st_mode, event.now.place.fd
    if stat.S_ISDIR(mode):
        packer.directory(path, packer.inspect(event.fd, event.now.place.layer))
    elif stat.S_ISREG(mode):
        pack_file(packer, path, above, name, at)
    else:
        pack_other(packer, path, above, name, at)


def size(now: list[Place], then: list[Place], settings: Settings) -> int:
    """Bytes of the regular files that `pack` would write, each inode once."""
    linked = Seen()
    total = 0
    for found in _differing(now, then, settings):
        if stat.S_ISREG(found.st_mode) and is_first(found, linked):
            total += found.st_size
    return total


def used(now: list[Place], then: list[Place], settings: Settings) -> Used:
    """Allocated bytes and inodes of what differs, each inode once; the top directory counts."""
    linked = Seen()
    total, inodes = os.fstat(now[0].fd).st_blocks * UNIT, 1
    for found in _differing(now, then, settings):
        if stat.S_ISDIR(found.st_mode) or is_first(found, linked):
            inodes += 1
            total += found.st_blocks * UNIT
    return Used(total, inodes)


def _differing(now: list[Place], then: list[Place], settings: Settings) -> Iterator[os.stat_result]:
    """What `now` has that differs."""
    for event in events(now, then, settings):
        if isinstance(event, Event) and event.now is not None and event.kind != "same":
            yield event.now.stat
