"""Who uses a directory tree that has a device number of its own and is no mount: a subvolume."""

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from aufsd.kernel import syscalls
from aufsd.kernel.holders import Use
from aufsd.results import Holder

# by each of these, where /proc has it: one link, or a directory of them
_ONE: Final[tuple[Use, ...]] = ("cwd", "root", "exe")
_MANY: Final[tuple[tuple[Use, str], ...]] = (("fd", "fd"), ("map", "map_files"))


def users_of(device: int) -> list[Holder]:
    """The processes that have something with this st_dev open or mapped, by pid.

    No server of a file system is asked. What may not be looked into is left out. Raises OSError
    only without a /proc.
    """
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        uses = list(_uses(f"/proc/{pid}", device))
        if uses:
            with suppress(OSError), open(f"/proc/{pid}/comm", errors="surrogateescape") as comm:
                found.append(Holder(pid, comm.read().rstrip("\n"), uses))
    return found


def _uses(process: str, device: int) -> Iterator[Use]:
    for use in _ONE:
        if _leads_to(f"{process}/{use}", device):
            yield use
    for use, name in _MANY:
        with suppress(OSError):
            links = os.listdir(f"{process}/{name}")
            if any(_leads_to(f"{process}/{name}/{link}", device) for link in links):
                yield use


def _leads_to(link: str, device: int) -> bool:
    with suppress(OSError):
        fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
        try:
            return syscalls.fstatx(fd).device == device
        finally:
            os.close(fd)
    return False
