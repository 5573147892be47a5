"""The three standard descriptors, for a program that may have been started without them."""

import os
import sys


def complete() -> None:
    """Put something in the place of standard descriptors that are closed; call it first.

    Else the next file that is opened gets the number, and is read and written as if it were that.
    Input and output that were closed stay unusable: EBADF. What goes to an error that was closed
    goes nowhere.
    """
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            # those below are open by now, so this is the number that it gets
            os.open(os.devnull, flags)
            os.set_inheritable(fd, True)
    # Python has None for those that were closed, and print() then says nothing and succeeds
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def flush() -> None:
    """Write out what was printed. Raises OSError if it cannot be, and then drops it.

    Python itself would try again at exit, and print a traceback of its own.
    """
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        raise
