"""Mounts a single layer read-only at its mount point, without a union.

This is for a layer without parents that has children or is sealed. Its directory must not be
written to, so it is not given out itself. Every backend that mounts uses it.
"""

import errno
import os
from typing import Final

from aufsd.kernel import syscalls
from aufsd.union import runner
from aufsd.union.backend import Union
from aufsd_client.errors import MountFailed

NAME: Final = "bind"


def mount(union: Union) -> None:
    """Show `union.top` at the target, read-only from the first moment. Raises MountFailed.

    It is a separate, private mount. So a mount that is made inside it later does not appear in the
    content.
    """
    at, empty = syscalls.AT_FDCWD, syscalls.AT_EMPTY_PATH
    try:
        tree = syscalls.open_tree(
            at,
            union.top,
            syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC | syscalls.AT_SYMLINK_NOFOLLOW,
        )
        try:
            read_only, private = syscalls.MOUNT_ATTR_RDONLY, syscalls.MS_PRIVATE
            syscalls.mount_setattr(tree, "", empty, attr_set=read_only, propagation=private)
            to = syscalls.MOVE_MOUNT_F_EMPTY_PATH
            with runner.mount_point(union.target) as target:
                syscalls.move_mount(tree, "", at, target, to | syscalls.MOVE_MOUNT_T_SYMLINKS)
        finally:
            os.close(tree)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        raise MountFailed(
            f"showing the content of layer {union.id} read-only failed with {name}: "
            f"{error.strerror}",
            id=union.id,
            errno=name,
            options="bind,ro",
        ) from error


def is_bind(union_target: str, content: str) -> bool:
    """Whether the target shows the content directory itself."""
    try:
        return os.path.samestat(os.lstat(union_target), os.lstat(content))
    except OSError:
        return False
