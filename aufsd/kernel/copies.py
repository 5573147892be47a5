"""A mount brought back from a copy of it, in this mount namespace or in another."""

import os
import threading
from collections.abc import Iterator
from contextlib import suppress

from aufsd.kernel import mountinfo, syscalls
from aufsd.kernel.mountinfo import Mount

_TREE = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC
_ROOT = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def bring_back(device: int, target: str) -> bool:
    """Mount the file system with this device number at `target`, from any copy; whether it is.

    A copy has to show all of it. Blocking: reads all of /proc.
    """
    for pid, row in _copies(device):
        with suppress(OSError):
            tree = _clone(pid, row.mount_point)
            try:
                to = syscalls.MOVE_MOUNT_F_EMPTY_PATH
                syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, to)
            finally:
                os.close(tree)
            return True
    return False


def _copies(device: int) -> Iterator[tuple[int, Mount]]:
    """One process of each mount namespace that has a copy, and where that is."""
    seen: set[str] = set()
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with suppress(OSError):
            space = os.readlink(f"/proc/{name}/ns/mnt")
            if space in seen:
                continue
            seen.add(space)
            for row in mountinfo.read(int(name)):
                if row.device == device and row.root == "/":
                    yield int(name), row
                    break


def _clone(pid: int, path: str) -> int:
    """A detached copy of a mount in the namespace of a process; its descriptor. Raises OSError.

    open_tree(2) clones what is in the caller's own namespace alone, so a thread goes there.
    """
    found: list[int | OSError] = []

    def go() -> None:
        try:
            root = os.open(f"/proc/{pid}/root", _ROOT)
            try:
                space = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    syscalls.unshare(syscalls.CLONE_FS)
                    syscalls.setns(space, syscalls.CLONE_NEWNS)
                finally:
                    os.close(space)
                found.append(syscalls.open_tree(root, path.lstrip("/") or ".", _TREE))
            finally:
                os.close(root)
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=go, name="namespace")
    thread.start()
    thread.join()
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]
