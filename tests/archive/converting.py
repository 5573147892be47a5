"""Conversion in a process of its own, as it runs in a child: it changes the working directory."""

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from aufsd.store.dialect import Dialect
from aufsd.store.walk import Way
from aufsd.union import conversion
from aufsd_client.errors import LayerDamaged
from tests.archive.shelf import NAMESPACE

OPAQUE = f"{NAMESPACE}.overlay.opaque"


def in_child(work: Callable[[], Any]) -> int:
    """The exit status of a process that does this: 0, 1 for LayerDamaged, -9 if killed."""
    pid = os.fork()
    if pid == 0:
        status = 3
        try:
            work()
            status = 0
        except LayerDamaged:
            status = 1
        except BaseException as error:
            sys.stderr.write(repr(error))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def convert(at: Path, target: Dialect, lies_below: Callable[[Way], bool] | None = None) -> int:
    def work() -> None:
        fd = os.open(at, os.O_RDONLY)
        done = conversion.convert(fd, target, NAMESPACE, sync=False, lies_below=lies_below)
        assert done is not conversion.convert(fd, target, NAMESPACE, sync=False)

    return in_child(work)


def convert_until(at: Path, target: Dialect, lines: int) -> int:
    """As `convert`, killed when that many lines of the module have been run."""

    def work() -> None:
        left = lines

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename != conversion.__file__:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), 9)
            return trace

        fd = os.open(at, os.O_RDONLY)
        sys.settrace(trace)
        conversion.convert(fd, target, NAMESPACE, sync=False)

    return in_child(work)


def build(at: Path, dialect: Dialect) -> None:
    """The same layer in either dialect, with a time of its own for every directory."""

    def gone(path: Path) -> None:
        if dialect is Dialect.AUFS:
            (path.parent / f".wh.{path.name}").touch(0o444)
            os.utime(path.parent / f".wh.{path.name}", (0, 0))
        else:
            os.mknod(path, stat.S_IFCHR | 0o444, 0)
            os.utime(path, (0, 0))

    def opaque(path: Path) -> None:
        if dialect is Dialect.AUFS:
            (path / ".wh..wh..opq").touch(0o444)
            os.utime(path / ".wh..wh..opq", (0, 0))
        else:
            os.setxattr(path, OPAQUE, b"y")

    (at / "d" / "e").mkdir(parents=True)
    (at / "opaque").mkdir()
    (at / "file").write_bytes(b"content")
    (at / "link").symlink_to("/nowhere")
    (at / "d" / "file").write_bytes(b"2")
    os.utime(at / "file", (5, 5))
    os.utime(at / "d" / "file", (5, 5))
    os.utime(at / "link", (5, 5), follow_symlinks=False)
    os.setxattr(at / "file", "user.overlay.opaque" if NAMESPACE == "trusted" else "user.x", b"y")
    gone(at / "gone")
    # below an opaque directory, and so below this root, one would not be kept
    gone(at / "é\n")
    opaque(at / "opaque")
    opaque(at / "d" / "e")
    opaque(at)
    for number, path in enumerate((at / "d" / "e", at / "d", at / "opaque", at)):
        os.utime(path, ns=(number, 10**18 + number))
