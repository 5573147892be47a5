"""A shelf of layers for a test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.archive.shelf import Shelf, open_shelf


@pytest.fixture
async def shelf(tmp_path: Path) -> AsyncIterator[Shelf]:
    async with open_shelf(tmp_path) as found:
        yield found
