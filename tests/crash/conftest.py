"""One zygote for all, and whether this machine lets one process trace another."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path

import pytest

from tests.crash.subject import Subject, Zygote, subject, zygote

Fresh = Callable[[], AbstractContextManager[Subject]]


@pytest.fixture(scope="session")
def shared_zygote() -> Iterator[Zygote]:
    """The process that all daemons here are forked from."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    probe = ["strace", "-o", os.devnull, "-p", str(os.getpid()), "-e", "trace=none"]
    try:
        subprocess.run(probe, capture_output=True, timeout=0.5, check=True)
    except subprocess.TimeoutExpired:
        pass
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no process may be traced here: {error.stderr.decode()}")
    with zygote() as made:
        yield made


@pytest.fixture
def fresh(shared_zygote: Zygote, tmp_path: Path) -> Fresh:
    """Makes a daemon over a new store, each time."""
    serial = count()
    return lambda: subject(shared_zygote, tmp_path / f"daemon{next(serial)}")
