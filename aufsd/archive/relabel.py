"""Sets an SELinux label on every inode of a layer.

It does the same as label.Relabel(path, label, shared=False) of opencontainers/selinux. It is for
layers that are not mounted, so that `context=` cannot label them. It writes the xattr, and so also
works on a kernel without SELinux.

It runs in a process of its own whose root is the layer. It follows no symlink and opens no file.
fsetxattr(2) takes no O_PATH descriptor, so each name is labelled from its own directory.
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
