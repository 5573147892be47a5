"""An SELinux label on everything that a layer holds.

What label.Relabel(path, label, shared=False) of opencontainers/selinux does, for file systems whose
layers are no mounts of their own, so that `context=` cannot label them (the seed's change message).
It works on the xattr, so also where the kernel has no SELinux.

Runs in a process of its own whose root is the layer. Nothing follows a symlink or opens a file:
fsetxattr(2) does not take an O_PATH descriptor, so each name is set from its own directory.
"""

import errno
import os
from typing import Final

from aufsd.kernel.beneath import DIRECTORY
from aufsd.store.walk import walk

XATTR: Final = "security.selinux"


def relabel(label: str) -> int:
    """Give every inode below the root the label; how many had another, or none.

    Symlinks and devices are labelled themselves. Raises OSError, NoSpace's among them.

    Setting one is a transaction of the file system's, 16 microseconds on btrfs, and a second
    thread would wait for the first one's.
    """
    value = label.encode()
    # a tree whose top has no label need not be asked name by name
    some = label_of("/") is not None
    changed = 0
    if not some or label_of("/") != value:
        changed += _set("/", value)
    top = os.open("/", DIRECTORY)
    try:
        for here in walk(top):
            os.fchdir(here.fd)
            with os.scandir(here.fd) as entries:
                for entry in entries:
                    name = entry.name
                    if entry.is_dir(follow_symlinks=False):
                        # as they are found: those that were made together lie together
                        here.later(name)
                    if not some or label_of(name) != value:
                        changed += _set(name, value)
    finally:
        os.close(top)
    return changed


def _set(name: str, value: bytes) -> int:
    os.setxattr(name, XATTR, value, follow_symlinks=False)
    return 1


def label_of(path: str) -> bytes | None:
    """The label of a file, a symlink not followed; None if it has none."""
    try:
        # a kernel with SELinux ends it with a NUL
        return os.getxattr(path, XATTR, follow_symlinks=False).rstrip(b"\0")
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return None
