"""What fuse-overlayfs notes for itself in a writable branch, taken out again after the unmount."""

import os
from typing import Final

from aufsd.store.dialect import XattrNamespace
from aufsd.store.walk import Descent, walk

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def strip(top: str, namespace: XattrNamespace) -> None:
    """Remove from a writable branch what fuse-overlayfs noted for itself.

    `trusted.overlay.opaque` beside every `.wh..wh..opq`, which aufs would copy up into other
    layers, and `user.fuseoverlayfs.*`. Walks the branch, opens nothing but directories.
    """
    own = ("trusted.overlay.", "user.fuseoverlayfs.")
    prefixes = (*own, "user.overlay.") if namespace == "user" else own
    root = os.open(top, _DIRECTORY)
    try:
        for here in walk(root):
            _strip_here(here, prefixes)
    finally:
        os.close(root)


def _strip_here(here: Descent, prefixes: tuple[str, ...]) -> None:
    """Strip a directory and the files in it."""
    # setxattr(2) takes no directory and a name, and the whole path may be longer than a path can be
    at = f"/proc/self/fd/{here.fd}"
    _strip(f"{at}/.", prefixes)
    with os.scandir(here.fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                here.later(entry.name)
            elif entry.is_file(follow_symlinks=False):
                _strip(f"{at}/{entry.name}", prefixes)


def _strip(path: str, prefixes: tuple[str, ...]) -> None:
    for name in os.listxattr(path, follow_symlinks=False):
        if name.startswith(prefixes):
            os.removexattr(path, name, follow_symlinks=False)
