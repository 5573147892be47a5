"""Makes a mount again from a copy of it, in this mount namespace or in another."""

import os
import threading
from collections.abc import Iterator
from contextlib import suppress

from aufsd.kernel import mountinfo, syscalls
from aufsd.kernel.mountinfo import Mount

_TREE = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC
_ROOT = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def bring_back(device: int, target: str) -> bool:
    """Mount the file system with this device number at `target`, from any copy. Whether it worked.

    The copy has to show the whole file system. Blocking: it reads all of /proc.
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
    """For each mount namespace with a copy: one of its processes, and the copy's mount point."""
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
    """A descriptor of a detached copy of a mount in a process's namespace. Raises OSError.

    open_tree(2) clones only mounts of the caller's own namespace, so a thread enters that
    namespace.
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
