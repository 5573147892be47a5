"""For tests that act as another user: what they need on the way to a socket."""

import stat
from pathlib import Path

_PASS = stat.S_IXGRP | stat.S_IXOTH


def let_in(path: Path) -> None:
    """Let every user pass through the directories above `path`; nothing else of them changes."""
    for directory in path.parents:
        mode = stat.S_IMODE(directory.stat().st_mode)
        if mode & _PASS != _PASS:
            directory.chmod(mode | _PASS)
