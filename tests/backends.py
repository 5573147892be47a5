"""The backends, as parameters of tests: each needs its tier."""

from typing import Final

import pytest

UNIONS: Final = (
    "overlay",
    pytest.param("fuse-overlayfs", marks=pytest.mark.fuse),
    pytest.param("aufs", marks=pytest.mark.aufs),
)
BACKENDS: Final = (*UNIONS, pytest.param("btrfs", marks=pytest.mark.btrfs))
# for tests that have `served` made from `each_backend`
on_unions = pytest.mark.parametrize("each_backend", UNIONS, indirect=True)
