"""Plans mount calls for a chain of branches, within the kernel's limits. Pure.

Two limits are dangerous, so this file keeps every plan within them. mount(2) cuts its data at one
page without an error. More than 83 options in one aufs call gave E2BIG, and then a 6.1 kernel hung
(fs/aufs/fsctx.c keeps them in an array of one page).
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from aufsd.kernel.syscalls import MS_RDONLY, MS_REMOUNT
from aufsd_client.errors import InvalidLabel, TooManyLayers

# copy_mount_options() in fs/namespace.c copies one page, of which the last byte must be NUL.
# 4096 is the smallest page; a larger one only leaves room
DATA_MAX: Final = 4095
# of aufs, in one call
OPTIONS_MAX: Final = 80
# OVL_MAX_STACK in fs/overlayfs/overlayfs.h
LOWERS_MAX: Final = 500
# a descriptor has at most this many digits: systemd's hard limit is 524288 of them
FD_DIGITS: Final = 6
_LABEL_MAX: Final = 255
_LABEL_COMMAS_MAX: Final = 40
# characters that end a path for overlayfs, aufs or generic_parse_monolithic(), or are hard to read
_AMBIGUOUS: Final = re.compile(r"[\x00-\x20\x7f,:=\\\"'#]")


@dataclass(frozen=True, slots=True)
class MountCall:
    """One mount(2) call.

    `data` is a format string whose `{0}`, `{1}`, ... stand for `dirs`. They are filled with the
    paths themselves or, `by_number`, with the numbers of descriptors opened on them: then the call
    is made from a thread whose working directory is /proc/thread-self/fd, a branch costs a few
    bytes of the page, and no byte of its path can be taken for an option's separator.
    """

    target: str
    fstype: str
    data: str
    dirs: tuple[str, ...]
    flags: int = 0
    by_number: bool = False

    def render(self, names: Sequence[str | int]) -> str:
        """The data, with `names` in place of `dirs`."""
        return self.data.format(*names)

    def __str__(self) -> str:
        """The call as a mount command; its paths are not escaped."""
        verb = "remount" if self.flags & MS_REMOUNT else "mount"
        return f"{verb} -t {self.fstype} -o {self.render(self.dirs)} {self.target}"


def plan_overlay(
    target: str,
    lowers: Sequence[str],
    *,
    upper: str = "",
    work: str = "",
    options: Sequence[str] = (),
    label: str = "",
) -> MountCall:
    """One overlayfs mount of `lowers`, topmost first; read-only without an `upper`.

    Raises TooManyLayers beyond LOWERS_MAX, and InvalidLabel for one too long.
    """
    if len(lowers) > LOWERS_MAX:
        raise _too_many(len(lowers), LOWERS_MAX)
    count = len(lowers)
    parts = ["lowerdir=" + ":".join(f"{{{i}}}" for i in range(count))]
    if upper:
        parts += [f"upperdir={{{count}}}", f"workdir={{{count + 1}}}"]
    return _fitted(
        MountCall(
            target,
            "overlay",
            ",".join([*parts, *options, *_context(label)]),
            (*lowers, upper, work) if upper else tuple(lowers),
            0 if upper else MS_RDONLY,
        )
    )


def plan_fuse(
    target: str,
    lowers: Sequence[str],
    *,
    upper: str = "",
    work: str = "",
    options: Sequence[str] = (),
    label: str = "",
) -> tuple[MountCall, MountCall]:
    """The kernel's half of a fuse-overlayfs mount, which lacks `fd=N`, and the program's own.

    Read-only without an `upper`. The program's paths are by number where one could be taken for
    something else; it has no page. Raises as plan_overlay.
    """
    served = plan_overlay(target, lowers, upper=upper, work=work)
    fstype = "fuse.fuse-overlayfs"
    data = ",".join([*options, *_context(label)])
    return (
        MountCall(target, fstype, data, (), served.flags),
        replace(served, fstype=fstype),
    )


def plan_aufs(
    target: str,
    branches: Sequence[str],
    *,
    work: str,
    read_only: bool = False,
    options: Sequence[str] = (),
    label: str = "",
    limit: int = 127,
) -> tuple[MountCall, ...]:
    """A mount of as many branches as one call takes, then `append:` remounts for the rest.

    The order is Docker's: `br:` first, options after it, the label on every call. The translation
    file (xino) is made in `work`, which no other mount may use. Raises TooManyLayers beyond `limit`
    branches (AUFS_BRANCH_MAX), and InvalidLabel for one too long or with too many commas.
    """
    if len(branches) > limit:
        raise _too_many(len(branches), limit)
    context = _context(label)
    flags = MS_RDONLY if read_only else 0
    # every branch of `br:` is an option of its own in the kernel's array
    room = OPTIONS_MAX - _count(*options, "xino", *context)
    modes = ["ro+wh" if read_only else "rw", *["ro+wh"] * (len(branches) - 1)]
    pairs = ":".join(f"{{{i}}}={mode}" for i, mode in enumerate(modes[:room], 1))
    data = ",".join([f"br:{pairs}", *options, "xino={0}/xino", *context])
    first = MountCall(target, "aufs", data, (work, *branches[:room]), flags)
    # by path only if that makes it one call: more calls are slower, and not all or nothing
    calls = [_fitted(first, by_number=len(branches) > room)]
    step = OPTIONS_MAX - _count(*context)
    for at in range(room, len(branches), step):
        dirs = tuple(branches[at : at + step])
        data = ",".join([*(f"append:{{{i}}}=ro+wh" for i in range(len(dirs))), *context])
        # without MS_RDONLY among them, the flags of a remount would make the union writable
        calls.append(_fitted(MountCall(target, "aufs", data, dirs, flags | MS_REMOUNT), True))
    return tuple(calls)


def longest(call: MountCall) -> int:
    """Bytes of the call's data once rendered, with the longest descriptor numbers there are."""
    if call.by_number:
        return _size(call.render(["9" * FD_DIGITS] * len(call.dirs)))
    return _size(call.render(call.dirs))


def _fitted(call: MountCall, by_number: bool = False) -> MountCall:
    """The call by path if its paths are unambiguous and fit into the page, else by number.

    By number every plan fits: 500 lowers of 7 bytes or 80 branches of 20, beside a label.
    """
    # what is too long need not be searched; and all in one search, for one for each of 120 paths
    # was a twelfth of what we add to their mount
    if by_number or longest(call) > DATA_MAX or _AMBIGUOUS.search("".join(call.dirs)):
        return replace(call, by_number=True)
    return call


def _context(label: str) -> list[str]:
    # quoted, because an MCS label holds commas: selinux_sb_eat_lsm_opts() honours the quotes
    if _size(label) > _LABEL_MAX or label.count(",") > _LABEL_COMMAS_MAX:
        raise InvalidLabel(
            f"a mount label has at most {_LABEL_MAX} bytes and {_LABEL_COMMAS_MAX} commas"
        )
    label = label.replace("{", "{{").replace("}", "}}")
    return [f'context="{label}"'] if label else []


def _count(*options: str) -> int:
    """Options as the kernel might count them: a comma inside quotes is one more."""
    return sum(option.count(",") + 1 for option in options)


def _size(text: str) -> int:
    return len(os.fsencode(text))


def _too_many(branches: int, limit: int) -> TooManyLayers:
    return TooManyLayers(
        f"a chain of {branches} layers, and this union file system takes {limit} in one mount",
        layers=branches,
        limit=limit,
    )
