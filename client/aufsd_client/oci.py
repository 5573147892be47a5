"""An OCI image layout of layers: one image for each id, one blob for each layer of its chain.

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
class _Layer:
    """A layer as a blob; `diff_id` is the digest of its tar, whatever the blob is packed with."""

    id: str
    diff_id: str
    descriptor: dict[str, Any]


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
    root = Path(directory)
    index = _open(root)
    layers: dict[str, _Layer] = {}
    manifests: dict[str, dict[str, Any]] = {}
    for name, chain in images.items():
        for id in chain:
            if id not in layers:
                layers[id] = _layer(root, id, write_layer, compress=compress)
        manifests[name] = _image(root, [layers[id] for id in chain], architecture or _here())
    kept = [
        manifest
        for manifest in index["manifests"]
        if manifest.get("annotations", {}).get(_NAME) not in manifests
    ]
    named = [
        manifest | {"annotations": {_NAME: name}} for name, manifest in sorted(manifests.items())
    ]
    _replace(root / "index.json", index | {"manifests": [*kept, *named]})
    return {name: manifest["digest"] for name, manifest in manifests.items()}


def _here() -> str:
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


def _layer(
    root: Path, id: str, write_layer: Callable[[str, IO[bytes]], None], *, compress: bool
) -> _Layer:
    with _fresh(root) as tar:
        write_layer(id, tar)
        diff_id = _digest(tar)
        if not compress:
            return _Layer(id, diff_id, _name(root, tar, diff_id, _LAYER))
        with _fresh(root) as packed:
            # neither a name nor a time: the same layer is the same blob
            with gzip.GzipFile("", "wb", 6, packed, 0) as stream:
                tar.seek(0)
                shutil.copyfileobj(tar, stream, 1 << 20)
            return _Layer(id, diff_id, _name(root, packed, _digest(packed), f"{_LAYER}+gzip"))


def _image(root: Path, layers: Sequence[_Layer], architecture: str) -> dict[str, Any]:
    """Write an image's configuration and manifest; the manifest's descriptor."""
    config: dict[str, Any] = {
        "created": _CREATED,
        "architecture": architecture,
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": _CREATED, "comment": f"layer {layer.id}"} for layer in layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _blob(root, config, _CONFIG),
        "layers": [layer.descriptor for layer in layers],
    }
    return _blob(root, manifest, _MANIFEST)


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


def _blob(root: Path, content: dict[str, Any], kind: str) -> dict[str, Any]:
    with _fresh(root) as file:
        file.write(json.dumps(content, separators=(",", ":")).encode())
        return _name(root, file, _digest(file), kind)


def _digest(file: IO[bytes]) -> str:
    file.seek(0)
    return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"  # type: ignore[arg-type]


def _name(root: Path, file: IO[bytes], digest: str, kind: str) -> dict[str, Any]:
    """Give a file the name of its digest; its descriptor."""
    os.fchmod(file.fileno(), 0o644)
    os.rename(file.name, root / "blobs" / digest.replace(":", "/"))
    return {"mediaType": kind, "digest": digest, "size": os.fstat(file.fileno()).st_size}


def _replace(path: Path, content: dict[str, Any]) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(json.dumps(content, indent=2) + "\n")
    fresh.rename(path)
