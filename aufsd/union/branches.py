"""Pure: a chain of branches becomes mount calls within the kernel's limits."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MountCall:
    """One mount(2) call. `data` may hold `{0}`, `{1}`, ... for directories that are passed by number.

    With `dirs`, the runner opens each as O_PATH and puts its descriptor number in: the call is made
    from a thread whose working directory is /proc/thread-self/fd, so that a branch costs a few
    bytes of the option page and no byte of its path can be taken for an option's separator.
    """

    target: str
    fstype: str
    data: str
    flags: int = 0
    source: str = "none"
    dirs: tuple[str, ...] = ()
