"""A layer's marks rewritten for the other union file system, in place.

Crash-safe: a mark on the layer's root says what the work is going to, before the first change and
until the last, so that it can be begun again at any point; nothing is lost in between, directory
times included. Works in the current directory of a process of its own.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import Final

from aufsd.kernel import syscalls
from aufsd.store import dialect as marks
from aufsd.store import whiteouts
from aufsd.store.dialect import Dialect
from aufsd.store.erase import erase
from aufsd.store.walk import Descent, Names, Way, walk
from aufsd_client.errors import LayerDamaged

_TIMES: Final = "aufsd.times"
# nanoseconds since 1970, of what may have been before
_NOTED: Final = re.compile(rb"(-?[0-9]{1,20}) (-?[0-9]{1,20})")
_NEVER: Final = 1 << 63
_NAME_MAX: Final = 255
# the mode of a whiteout that a crash may leave without the attributes of the one it stands for:
# a conversion may go back from there, and the other one is right then
_UNFINISHED: Final = 0o1000


# whether the layers below show this directory
Below = Callable[[Way], bool]


def convert(
    root: int, target: Dialect, namespace: str, *, sync: bool, lies_below: Below | None = None
) -> bool:
    """Bring the layer with the root directory `root` (a descriptor) into a dialect.

    Whiteouts in a directory with nothing below it hide nothing, and overlayfs would list them: they
    are not written again. With no `lies_below` that is known of opaque directories only.
    False if it was in it already. Raises LayerDamaged, with nothing changed, if the layer holds
    what the other dialect cannot say; a conversion that was cut off is finished without asking.
    With `sync` the content is on disk before it counts as converted.
    """
    half = marks.interrupted(root, namespace)
    source = marks.read_dialect(root, namespace)
    if half is None:
        if source is target:
            return False
        if source is Dialect.NONE:
            why = "it holds its parents' content too, and has no marks to convert"
            raise LayerDamaged(f"the layer cannot be converted: {why}", problem=why)
        _refuse(root, target, namespace)
    marks.mark_converting(root, target, namespace)
    if sync:
        syscalls.syncfs(root)
    rewrite(root, target, namespace, lies_below)
    if sync:
        syscalls.syncfs(root)
    marks.write_dialect(root, target, namespace)
    marks.mark_converting(root, None, namespace)
    if sync:
        os.fsync(root)
    return True


def rewrite(root: int, target: Dialect, namespace: str, lies_below: Below | None = None) -> None:
    """Rewrite every mark of the other dialect below `root`, whatever state a crash left."""
    change = _to_overlay if target is Dialect.OVERLAY else _to_aufs
    # of each directory on the way, whether what it holds has nothing below it
    cut: list[bool] = []
    for here in walk(root):
        fd, top = here.fd, not here.depth
        os.fchdir(fd)
        del cut[here.depth :]
        opaque = whiteouts.has_opaque_xattr(fd, namespace) or os.path.lexists(whiteouts.OPAQUE)
        cut.append(opaque or (not top and cut[-1]))
        with _times_kept(fd, namespace):
            # the root is always merged
            if not top and _has_whiteout():
                if not cut[-1] and lies_below is not None:
                    # what lies in a directory with none below has none below either
                    cut[-1] = not lies_below(here.way)
                if cut[-1]:
                    _drop_whiteouts(root, namespace)
            change(fd, namespace)
        _enter_later(here)


def _enter_later(here: Descent) -> None:
    with os.scandir(b".") as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                here.later(entry.name)


def _has_whiteout() -> bool:
    with os.scandir(b".") as entries:
        return any(_is_whiteout(entry) for entry in entries)


def _drop_whiteouts(root: int, namespace: str) -> None:
    """Remove the whiteouts of either dialect in the current directory, and note it on the root."""
    found = Names()
    some = False
    with os.scandir(b".") as entries:
        for entry in entries:
            deleted = whiteouts.deleted_name(entry.name)
            # beside a name of its own one means that what lies below that is not there
            if whiteouts.is_node(entry) or (deleted is not None and not _is_content(deleted)):
                found.add(entry.name)
                some = True
    if some:
        # what was recorded of the layer counts them
        marks.remove_xattr(root, f"{namespace}.aufsd.fingerprint")
        marks.mark_settled(root, namespace)
    for name in found:
        os.unlink(name)


def _is_content(name: bytes) -> bool:
    """Whether the current directory has a name, and it is no whiteout."""
    try:
        return not whiteouts.is_whiteout_node(os.lstat(name))
    except FileNotFoundError:
        return False


def _is_whiteout(entry: os.DirEntry[bytes]) -> bool:
    return whiteouts.deleted_name(entry.name) is not None or whiteouts.is_node(entry)


def _refuse(root: int, target: Dialect, namespace: str) -> None:
    """Raise LayerDamaged if something in the layer has no way of being said in `target`."""
    overlay = f"{namespace}.overlay."
    for here in walk(root):
        os.fchdir(here.fd)
        with os.scandir(b".") as entries:
            for entry in entries:
                name = entry.name
                if entry.is_dir(follow_symlinks=False):
                    here.later(name)
                if target is Dialect.OVERLAY:
                    if whiteouts.is_node(entry):
                        raise _unsayable(name, "a device 0:0 would become a deleted file")
                    continue
                if name.startswith(whiteouts.WHITEOUT):
                    raise _unsayable(name, "its name would stand for a deleted file")
                if whiteouts.is_node(entry) and len(name) > _NAME_MAX - len(whiteouts.WHITEOUT):
                    raise _unsayable(name, "the name of its whiteout would be too long")
                for xattr in os.listxattr(name, follow_symlinks=False):
                    if xattr in (f"{overlay}redirect", f"{overlay}metacopy"):
                        raise _unsayable(name, f"part of it lies elsewhere ({xattr})")
                    if xattr == f"{overlay}whiteout":
                        raise _unsayable(name, f"it may be a deleted file ({xattr})")


def _unsayable(name: bytes, why: str) -> LayerDamaged:
    shown = name.decode("utf-8", "backslashreplace")
    return LayerDamaged(
        f"the layer cannot be converted: it holds {shown!r}, and {why}", problem=why, entry=shown
    )


# --- one directory, which is the current one ----------------------------------------------------


def _to_overlay(fd: int, namespace: str) -> None:
    for name in _marks():
        deleted = whiteouts.deleted_name(name)
        if name == whiteouts.OPAQUE:
            os.setxattr(fd, whiteouts.opaque_xattr(namespace), b"y")
        elif deleted is not None:
            _whiteout_to_overlay(name, deleted, namespace)
        # all other names of this kind are aufs's housekeeping, or what a crash of it left
        left = erase(fd, name, os.fsdecode(name))
        if left is not None:
            raise left.error()


def _whiteout_to_overlay(name: bytes, deleted: bytes, namespace: str) -> None:
    try:
        found = os.lstat(deleted)
    except FileNotFoundError:
        os.mknod(deleted, whiteouts.WHITEOUT_NODE | _UNFINISHED, whiteouts.WHITEOUT_DEVICE)
        _copy_attributes(name, deleted)
        return
    if stat.S_ISDIR(found.st_mode):
        # both stand side by side: the new directory is there, what lies below is not
        os.setxattr(deleted, whiteouts.opaque_xattr(namespace), b"y")
    elif whiteouts.is_whiteout_node(found) and stat.S_IMODE(found.st_mode) == _UNFINISHED:
        _copy_attributes(name, deleted)


def _to_aufs(fd: int, namespace: str) -> None:
    overlay = f"{namespace}.overlay."
    if whiteouts.has_opaque_xattr(fd, namespace):
        _make_mark(whiteouts.OPAQUE, 0o444)
        os.utime(whiteouts.OPAQUE, ns=(0, 0))
    _strip(b".", overlay)
    found = Names()
    with os.scandir(b".") as entries:
        for entry in entries:
            if whiteouts.is_node(entry):
                found.add(entry.name)
            elif not entry.is_dir(follow_symlinks=False):
                _strip(entry.name, overlay)
    for name in found:
        mark = whiteouts.WHITEOUT + name
        _make_mark(mark, _UNFINISHED)
        if stat.S_IMODE(os.lstat(mark).st_mode) == _UNFINISHED:
            _copy_attributes(name, mark)
        os.unlink(name)


def _marks() -> Names:
    """The names of the current directory that aufs takes for its own."""
    found = Names()
    with os.scandir(b".") as entries:
        for entry in entries:
            if entry.name.startswith(whiteouts.WHITEOUT):
                found.add(entry.name)
    return found


def _strip(name: bytes, overlay: str) -> None:
    for xattr in os.listxattr(name, follow_symlinks=False):
        if xattr.startswith(overlay):
            os.removexattr(name, xattr, follow_symlinks=False)


def _make_mark(path: bytes, mode: int) -> None:
    with contextlib.suppress(FileExistsError):
        os.mknod(path, stat.S_IFREG | mode)


def _copy_attributes(source: bytes, target: bytes) -> None:
    """Give a new whiteout the owner, times and mode of the other.

    No reader of either asks for them, but a layer that goes there and back is then the same.
    """
    found = os.lstat(source)
    os.lchown(target, found.st_uid, found.st_gid)
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns), follow_symlinks=False)
    # last: it says that the others were set. Of a symlink, which is nobody's whiteout, it is 0777
    os.chmod(target, stat.S_IMODE(found.st_mode))


@contextlib.contextmanager
def _times_kept(fd: int, namespace: str) -> Iterator[None]:
    """Give the directory its times back, also if a crash comes between: they are noted on it."""
    name = f"{namespace}.{_TIMES}"
    times = noted_times(fd, namespace)
    if times is None:
        before = os.fstat(fd)
        times = (before.st_atime_ns, before.st_mtime_ns)
        if _has_work() or whiteouts.has_opaque_xattr(fd, namespace):
            os.setxattr(fd, name, b"%d %d" % times)
    yield
    if os.fstat(fd).st_mtime_ns != times[1]:
        os.utime(fd, ns=times)
    marks.remove_xattr(fd, name)


def noted_times(fd: int, namespace: str) -> tuple[int, int] | None:
    """Access and modification time that a directory had before its marks were rewritten.

    None where nothing is noted, or nothing that a conversion would have noted.
    """
    try:
        found = _NOTED.fullmatch(os.getxattr(fd, f"{namespace}.{_TIMES}"))
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return None
    times = (int(found[1]), int(found[2])) if found else (_NEVER, _NEVER)
    return times if all(abs(time) < _NEVER for time in times) else None


def _has_work() -> bool:
    with os.scandir(b".") as entries:
        for entry in entries:
            if entry.name.startswith(whiteouts.WHITEOUT) or whiteouts.is_node(entry):
                return True
    return False
