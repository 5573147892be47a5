"""The kernel's log, the only place with its reason for refusing a mount."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

# devkmsg_read() in kernel/printk/printk.c gives one record a read(2), never longer than this
_RECORD = 8192


@dataclass(slots=True)
class KernelLog:
    """Reads /dev/kmsg without waiting. The descriptor stays open for the process's life.

    If it may not be read (no CAP_SYSLOG with a restricted dmesg, or no /dev/kmsg in a container),
    `fd` is -1 and the log is empty.
    """

    fd: int

    def mark(self) -> None:
        """Skip all lines up to now."""
        if self.fd >= 0:
            os.lseek(self.fd, 0, os.SEEK_END)

    def since(self) -> list[str]:
        """The lines since the mark, or since the last call."""
        return list(self._lines()) if self.fd >= 0 else []

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                record = os.read(self.fd, _RECORD)
            except BlockingIOError:
                return
            except BrokenPipeError:
                continue  # records were overwritten before they were read; the next read goes on
            # "6,339,5140900,-;text\n KEY=value\n"
            text = record.decode("utf-8", "replace").partition(";")[2]
            yield text.partition("\n")[0]


def open_log() -> KernelLog:
    """The log from now on."""
    fd = -1
    with suppress(OSError):
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    log = KernelLog(fd)
    log.mark()
    return log
