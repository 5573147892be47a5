"""Images as tools leave them: which layers one has, and where each of them lies.

An OCI image layout, `docker save` (before and since Docker 25) and skopeo's `dir:`, each as a
directory or a tar; anything else that is a tar is a root file system. Nothing is unpacked here:
layers are read by who applies them. What says how an image is put together (index, manifest,
configuration) is held against its digest as it is read; image-spec 1.1, image-layout.md, and
moby's image/tarexport. Standard library only.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aufsd_client.blobs import Blob, BlobMissing, Files, ImageError, is_image_archive, open_files
from aufsd_client.oci import this_machine

__all__ = ["Blob", "Image", "ImageError", "ImageLayer", "RootTar", "chain_ids", "opened"]

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_LAYER = re.compile(
    r"application/vnd\.(oci\.image\.layer\.(nondistributable\.)?v1\.tar(\+gzip|\+zstd)?"
    r"|docker\.image\.rootfs\.(diff|foreign\.diff)\.tar(\.gzip|\.zstd)?)"
)
_FOREIGN = ("foreign", "nondistributable")
_NAMES = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
# of an index in an index; one of registries is never deeper than one
_DEEPEST = 4


@dataclass(frozen=True, slots=True)
class ImageLayer:
    """One layer: the digest of its tar, and of its blob ("" if nothing says that)."""

    diff_id: str
    digest: str
    blob: Blob


@dataclass(frozen=True, slots=True)
class Image:
    """An image: its layers, base first, and its configuration. `digest`: its manifest's, or ""."""

    name: str
    digest: str
    config: dict[str, Any]
    layers: tuple[ImageLayer, ...]


@dataclass(frozen=True, slots=True)
class RootTar:
    """A tar that is a root file system."""

    path: str


def chain_ids(diff_ids: list[str]) -> list[str]:
    """What names each layer together with all below it (image-spec, config.md, ChainID)."""
    found: list[str] = []
    for diff_id in diff_ids:
        if not found:
            found.append(diff_id)
            continue
        text = f"{found[-1]} {diff_id}".encode()
        found.append(f"sha256:{hashlib.sha256(text).hexdigest()}")
    return found


@contextmanager
def opened(source: str, ref: str = "", platform: str = "") -> Iterator[Image | RootTar]:
    """The image at a path: the one that `ref` names, or the only one there. Open in the block.

    `platform` is OS/ARCHITECTURE[/VARIANT], this machine's if it is "". Raises ImageError, OSError.
    """
    if not os.path.isdir(source) and not is_image_archive(source):
        if ref:
            raise ImageError(f"{source} is one tar and no image, so there is no {ref} in it")
        yield RootTar(source)
        return
    wanted = _platform(platform)
    with open_files(source) as files:
        yield _find(files, source, ref, wanted)


def _find(files: Files, source: str, ref: str, wanted: tuple[str, ...]) -> Image:
    if files.has("manifest.json"):
        listed = _json(files.read("manifest.json"), "manifest.json")
        if isinstance(listed, list):
            return _of_docker(files, listed, ref)
        return _of_manifest(files, "", files.read("manifest.json"), "")
    if not files.has("index.json"):
        raise ImageError(
            f"{source} is no image: it has neither an index.json (an OCI layout) nor a "
            "manifest.json (docker save)"
        )
    index = _object(_json(files.read("index.json"), "index.json"), "index.json")
    return _of_index(files, index, ref, wanted)


# --- OCI ------------------------------------------------------------------------------------------


def _of_index(files: Files, index: dict[str, Any], ref: str, wanted: tuple[str, ...]) -> Image:
    rows = [row for row in _list(index, "manifests", "index.json") if _is_image(row)]
    named = [row for row in rows if ref in ("", row.get("digest"), *_names(row))]
    if not named:
        known = sorted({name for row in rows for name in _names(row)})
        raise ImageError(f"there is no image {ref} in it; it has {_listed(known)}")
    names = {_name(row) for row in named}
    if not ref and len(names) > 1:
        raise ImageError(f"there are several images in it: say which of {_listed(sorted(names))}")
    descriptor = named[0] if len(named) == 1 else _for_platform(named, wanted)
    name = _name(descriptor)
    for _ in range(_DEEPEST):
        content = _checked(files, descriptor)
        kind = descriptor.get("mediaType")
        if kind not in _INDEXES:
            return _of_manifest(files, name, content, str(descriptor["digest"]))
        below = _object(_json(content, "an index"), "an index")
        rows = [row for row in _list(below, "manifests", "an index") if _is_image(row)]
        descriptor = _for_platform(rows, wanted)
    raise ImageError("it holds indexes of indexes, deeper than any image needs")


def _is_image(row: object) -> bool:
    """Whether a row of an index may be an image; what build tools attest beside one is none."""
    if not isinstance(row, dict):
        raise ImageError("an index of it holds something that is no descriptor")
    about = row.get("annotations") or {}
    return (
        row.get("mediaType") in (None, *_INDEXES, *_MANIFESTS)
        and about.get("vnd.docker.reference.type") != "attestation-manifest"
    )


def _names(row: Mapping[str, Any]) -> list[str]:
    about = row.get("annotations") or {}
    return [name for key in _NAMES if isinstance(name := about.get(key), str)]


def _name(row: Mapping[str, Any]) -> str:
    return next(iter(_names(row)), "")


def _platform(text: str) -> tuple[str, ...]:
    if not text:
        return ("linux", this_machine())
    parts = tuple(text.split("/"))
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise ImageError(f"{text} is no platform such as linux/arm64 or linux/arm/v7")
    return parts


def _for_platform(rows: list[dict[str, Any]], wanted: tuple[str, ...]) -> dict[str, Any]:
    """The row for a platform; the first, where the variant is not asked for."""
    has = []
    for row in rows:
        said = row.get("platform")
        if not isinstance(said, dict):
            if len(rows) == 1:
                return row
            continue
        own = (said.get("os"), said.get("architecture"), said.get("variant"))
        if own[: len(wanted)] == wanted:
            return row
        has.append("/".join(str(part) for part in own if part))
    raise ImageError(
        f"it has no image for {'/'.join(wanted)}; it has {_listed(has)}: --platform takes another"
    )


def _of_manifest(files: Files, name: str, content: bytes, digest: str) -> Image:
    manifest = _object(_json(content, "the manifest"), "the manifest")
    if manifest.get("schemaVersion") != 2:
        raise ImageError("its manifest is not of version 2; skopeo copy --format oci writes one")
    config = _object(
        _json(_checked(files, _object(manifest.get("config"), "the manifest")), "it"), "it"
    )
    diff_ids = _diff_ids(config)
    rows = _list(manifest, "layers", "the manifest")
    if len(rows) != len(diff_ids):
        raise ImageError(
            f"its manifest has {len(rows)} layers and its configuration {len(diff_ids)}"
        )
    layers = tuple(
        _layer(files, _object(row, "the manifest"), diff_id)
        for row, diff_id in zip(rows, diff_ids, strict=True)
    )
    own = digest or f"sha256:{hashlib.sha256(content).hexdigest()}"
    return Image(name, own, config, layers)


def _layer(files: Files, row: dict[str, Any], diff_id: str) -> ImageLayer:
    kind, digest = str(row.get("mediaType", "")), _digest(row)
    if not _LAYER.fullmatch(kind):
        raise ImageError(f"layer {digest} is of a kind that cannot be unpacked: {kind}")
    try:
        return ImageLayer(diff_id, digest, files.blob(digest))
    except BlobMissing as error:
        if not any(word in kind for word in _FOREIGN):
            raise
        where = ", ".join(map(str, row.get("urls") or ())) or "nobody says where"
        raise ImageError(f"layer {digest} is foreign and not in it; it is at: {where}") from error


# --- docker save ----------------------------------------------------------------------------------


def _of_docker(files: Files, rows: list[Any], ref: str) -> Image:
    images = [_object(row, "manifest.json") for row in rows]
    tags = sorted(tag for row in images for tag in _tags(row))
    if ref:
        images = [row for row in images if ref in _spellings(row)]
        if not images:
            raise ImageError(f"there is no image {ref} in it; it has {_listed(tags)}")
    if len(images) != 1:
        raise ImageError(f"there are {len(images)} images in it: say which of {_listed(tags)}")
    (row,) = images
    path = str(row.get("Config", ""))
    content = files.read(path)
    # HEX.json, or blobs/sha256/HEX since Docker 25
    own = os.path.basename(path).removesuffix(".json")
    if hashlib.sha256(content).hexdigest() != own:
        raise ImageError(f"the configuration {path} is not what its name says: it was changed")
    config = _object(_json(content, path), path)
    diff_ids = _diff_ids(config)
    paths = [str(each) for each in _list(row, "Layers", "manifest.json")]
    if len(paths) != len(diff_ids):
        raise ImageError(f"it has {len(paths)} layers, and its configuration {len(diff_ids)}")
    layers = tuple(
        ImageLayer(diff_id, _digest_of_path(path), files.at(path))
        for path, diff_id in zip(paths, diff_ids, strict=True)
    )
    return Image(next(iter(_tags(row)), ""), "", config, layers)


def _tags(row: Mapping[str, Any]) -> list[str]:
    return [str(tag) for tag in row.get("RepoTags") or ()]


def _spellings(row: Mapping[str, Any]) -> Iterator[str]:
    """What an image may be called: its tags, as Docker shortens them, and its id."""
    for tag in _tags(row):
        short = tag.removeprefix("docker.io/").removeprefix("library/")
        for each in (tag, short):
            yield from (each, each.removesuffix(":latest"))
    own = os.path.basename(str(row.get("Config", ""))).removesuffix(".json")
    yield from (own, f"sha256:{own}")


def _digest_of_path(path: str) -> str:
    parts = path.split("/")
    return f"sha256:{parts[2]}" if parts[:2] == ["blobs", "sha256"] and len(parts) == 3 else ""


# --- what they share ------------------------------------------------------------------------------


def _checked(files: Files, row: dict[str, Any]) -> bytes:
    digest = _digest(row)
    content = files.blob(digest).read()
    if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
        raise ImageError(f"the blob {digest} is not what its name says: it was changed")
    return content


def _digest(row: Mapping[str, Any]) -> str:
    digest = str(row.get("digest", ""))
    if not _DIGEST.fullmatch(digest):
        raise ImageError(f"{digest[:80]!r} is no digest of the kind sha256:HEX, which is needed")
    return digest


def _diff_ids(config: dict[str, Any]) -> list[str]:
    rootfs = config.get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or not all(
        isinstance(each, str) and _DIGEST.fullmatch(each) for each in found
    ):
        raise ImageError("its configuration names no layers: it is no image of a file system")
    if not found:
        raise ImageError("it has no layers")
    return found


def _json(content: bytes, what: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what} is not JSON: {error}") from None


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ImageError(f"{what} is not as it should be: an object is missing")
    return value


def _list(value: Mapping[str, Any], key: str, what: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list):
        raise ImageError(f"{what} is not as it should be: it has no list {key}")
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(name for name in names if name) or "none with a name"
