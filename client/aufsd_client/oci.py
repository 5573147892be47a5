"""An OCI image layout: one blob for each layer, one manifest and configuration for each image.

Knows nothing of where the layers come from. Standard library only. image-spec 1.0: image-layout.md,
config.md, manifest.md; blobs are named by their sha256.
"""

import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_NAME = "org.opencontainers.image.ref.name"
# a store does not know when a layer was made; without any time Docker says 292 years ago
_CREATED = "1970-01-01T00:00:00Z"
# GOARCH, which the specification asks for, by what uname(2) says
_ARCHITECTURES = {
    "x86_64": "amd64",
    "i686": "386",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "loongarch64": "loong64",
}


class LayoutError(Exception):
    """The directory holds something else than an OCI image layout."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as a blob; `diff_id` is the digest of its tar, whatever the blob is packed with."""

    diff_id: str
    descriptor: dict[str, Any]


@dataclass(slots=True)
class Layout:
    """An image layout that is being written to. Images are in its index from `commit` on."""

    root: Path
    compress: bool
    _index: dict[str, Any]
    _images: dict[str, dict[str, Any]]

    def add_layer(self, write: Callable[[IO[bytes]], str | None]) -> Layer:
        """Add the tar that `write(file)` writes to an empty file, and whose digest it may know.

        Raises OSError, and what `write` raises.
        """
        with _fresh(self.root) as tar:
            diff_id = write(tar) or _digest(tar)
            if not self.compress:
                return Layer(diff_id, _name(self.root, tar, diff_id, _LAYER))
            with _fresh(self.root) as packed:
                # neither a name nor a time: the same layer is the same blob
                with gzip.GzipFile("", "wb", 6, packed, 0) as stream:
                    tar.seek(0)
                    shutil.copyfileobj(tar, stream, 1 << 20)
                kind = f"{_LAYER}+gzip"
                return Layer(diff_id, _name(self.root, packed, _digest(packed), kind))

    def add_image(self, name: str, config: bytes, layers: Sequence[Layer]) -> str:
        """Add an image of these layers, base first; the digest of its manifest."""
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _blob(self.root, config, _CONFIG),
            "layers": [layer.descriptor for layer in layers],
        }
        self._images[name] = _blob(self.root, _compact(manifest), _MANIFEST)
        return str(self._images[name]["digest"])

    def commit(self) -> None:
        """Put the images into the index, in place of those that have their names already."""
        kept = [
            manifest
            for manifest in self._index["manifests"]
            if manifest.get("annotations", {}).get(_NAME) not in self._images
        ]
        named = [
            manifest | {"annotations": {_NAME: name}}
            for name, manifest in sorted(self._images.items())
        ]
        _replace(self.root / "index.json", self._index | {"manifests": [*kept, *named]})


def open_layout(directory: str | os.PathLike[str], *, compress: bool = False) -> Layout:
    """The layout at `directory`, which is made if it is empty or not there.

    What it holds already stays. `compress`: layers are packed with gzip. Raises LayoutError,
    OSError.
    """
    root = Path(directory)
    return Layout(root, compress, _open(root), {})


def write(
    directory: str | os.PathLike[str],
    images: Mapping[str, Sequence[str]],
    write_layer: Callable[[str, IO[bytes]], None],
    *,
    compress: bool = False,
    architecture: str = "",
) -> dict[str, str]:
    """Put images into the layout at `directory`: by name, the ids of their layers, base first.

    `write_layer(id, file)` writes a layer's tar to a new file; it is called once for each layer,
    however many images stand on it. The layout is made if there is none; what it holds already
    stays, but for images of the same names. Returns the digests of the manifests, by name. Raises
    LayoutError, OSError and what `write_layer` raises: then the layout's index is as it was.
    """
    layout = open_layout(directory, compress=compress)
    layers: dict[str, Layer] = {}
    digests = {}
    for name, chain in images.items():
        for id in chain:
            if id not in layers:
                layers[id] = layout.add_layer(partial(write_layer, id))
        found = [layers[id] for id in chain]
        config = _plain(chain, found, architecture or this_machine())
        digests[name] = layout.add_image(name, config, found)
    layout.commit()
    return digests


def _plain(ids: Sequence[str], layers: Sequence[Layer], architecture: str) -> bytes:
    """The configuration of an image of which only the layers are known."""
    return _compact(
        {
            "created": _CREATED,
            "architecture": architecture,
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created": _CREATED, "comment": f"layer {id}"} for id in ids],
        }
    )


def this_machine() -> str:
    """This machine's architecture, as images name it."""
    machine = os.uname().machine
    return _ARCHITECTURES.get(machine, machine)


def _open(root: Path) -> dict[str, Any]:
    """The index of the layout, which is made if the directory is empty."""
    try:
        index: dict[str, Any] = json.loads((root / "index.json").read_bytes())
        if not isinstance(index.get("manifests"), list):
            raise LayoutError(f"{root}/index.json is not that of an OCI image layout")
    except (ValueError, AttributeError) as error:
        raise LayoutError(f"{root}/index.json is not that of an OCI image layout") from error
    except FileNotFoundError:
        root.mkdir(exist_ok=True)
        if {entry.name for entry in root.iterdir()} - {"oci-layout", "blobs"}:
            raise LayoutError(f"{root} is not empty, and no OCI image layout") from None
        index = {"schemaVersion": 2, "manifests": []}
    (root / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    _replace(root / "oci-layout", {"imageLayoutVersion": "1.0.0"})
    return index


# --- blobs --------------------------------------------------------------------------------------


@contextmanager
def _fresh(root: Path) -> Iterator[IO[bytes]]:
    """A file that will be a blob if it gets its name, and is gone if not."""
    file = tempfile.NamedTemporaryFile(dir=root / "blobs/sha256", prefix=".", delete=False)  # noqa: SIM115
    try:
        yield file
    finally:
        file.close()
        Path(file.name).unlink(missing_ok=True)


def _compact(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _blob(root: Path, content: bytes, kind: str) -> dict[str, Any]:
    with _fresh(root) as file:
        file.write(content)
        return _name(root, file, _digest(file), kind)


def _digest(file: IO[bytes]) -> str:
    file.seek(0)
    return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"  # type: ignore[arg-type]


def _name(root: Path, file: IO[bytes], digest: str, kind: str) -> dict[str, Any]:
    """Give a file the name of its digest; its descriptor."""
    file.flush()
    os.fchmod(file.fileno(), 0o644)
    os.rename(file.name, root / "blobs" / digest.replace(":", "/"))
    return {"mediaType": kind, "digest": digest, "size": os.fstat(file.fileno()).st_size}


def _replace(path: Path, content: dict[str, Any]) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(json.dumps(content, indent=2) + "\n")
    fresh.rename(path)
