"""One zygote for all."""

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
    with zygote() as made:
        yield made


@pytest.fixture
def fresh(shared_zygote: Zygote, tmp_path: Path) -> Fresh:
    """Makes a daemon over a new store, each time."""
    serial = count()
    return lambda: subject(shared_zygote, tmp_path / f"daemon{next(serial)}")


@pytest.fixture
def fresh_on_btrfs(shared_zygote: Zygote, on_btrfs: Path) -> Fresh:
    """The same on btrfs."""
    serial = count()
    return lambda: subject(shared_zygote, on_btrfs / f"{next(serial)}")
