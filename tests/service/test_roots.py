"""What the daemon remembers of a layer's `/` is forgotten when the layer changes."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from tests.daemon import daemon

pytestmark = pytest.mark.service


def tar(*names: str) -> bytes:
    """Empty files in a tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name in names:
            file.addfile(tarfile.TarInfo(name))
    return out.getvalue()


def test_a_root_that_becomes_opaque_hides_its_parents_at_the_next_mount(tmp_path: Path) -> None:
    with daemon(tmp_path) as running, running.client() as client:
        client.create("base")
        client.apply_diff("base", tar("below"))
        client.create("top", parent="base")
        with client.mounted("top") as path:
            assert os.listdir(path) == ["below"]
        client.apply_diff("top", tar(".wh..wh..opq", "above"))
        with client.mounted("top") as path:
            assert os.listdir(path) == ["above"]


def test_a_layer_made_again_under_its_name_is_looked_at_again(tmp_path: Path) -> None:
    with daemon(tmp_path) as running, running.client() as client:
        client.create("base")
        client.apply_diff("base", tar("below"))
        for content, seen in ((".wh..wh..opq", []), ("above", ["above", "below"])):
            client.create("top", parent="base")
            client.apply_diff("top", tar(content))
            with client.mounted("top") as path:
                assert sorted(os.listdir(path)) == seen
            client.remove("top")
