"""A data root that Docker wrote, unpacked; and what is in it. Shares no code with aufsd."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.archives import unpack_xz

DATA = Path(__file__).parent.parent / "data/docker-overlay2"
AUFSD = Path(sys.executable).parent / "aufsd"


def unpack(directory: Path) -> Path:
    """The data root as it was in /var/lib/docker."""
    unpack_xz(DATA / "data-root.tar.xz", directory)
    return directory


def ids(root: Path) -> dict[str, str]:
    """The image ids by name, as Docker wrote them."""
    written = json.loads((root / "image/overlay2/repositories.json").read_text())["Repositories"]
    return {name: id for names in written.values() for name, id in names.items() if "@" not in name}


def config(root: Path, id: str) -> dict[str, Any]:
    """The configuration of an image."""
    path = root / "image/overlay2/imagedb/content" / id.replace(":", "/")
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def content(root: Path, diff_id: str) -> Path:
    """Where the files of a layer lie."""
    for found in (root / "image/overlay2/layerdb/sha256").iterdir():
        if (found / "diff").read_text() == diff_id:
            return root / "overlay2" / (found / "cache-id").read_text() / "diff"
    raise LookupError(diff_id)


def tar_split(root: Path, diff_id: str) -> Path:
    """What Docker kept of the layer's tar."""
    for found in (root / "image/overlay2/layerdb/sha256").iterdir():
        if (found / "diff").read_text() == diff_id:
            return found / "tar-split.json.gz"
    raise LookupError(diff_id)


def rescue(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    command = [AUFSD, "rescue", "--docker-root", root, *arguments]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
