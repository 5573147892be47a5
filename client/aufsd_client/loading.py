"""Loads images into a store: makes the layers of the image that are not there yet.

A layer's id is made from its chain (`images.chain_ids`). So images share layers, and an image that
was loaded is found again. The seal of a layer is its commit: a layer without a seal is left of an
interrupted load, and is made again. A daemon has one load at a time. Standard library only.
"""

import fcntl
import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from aufsd_client import images
from aufsd_client.client import Client
from aufsd_client.errors import (
    AufsdError,
    BadArchive,
    LayerExists,
    LayerHasChildren,
    LayerNotFound,
)
from aufsd_client.images import Image, ImageError, ImageLayer, RootTar

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 20


# entered with a layer's id and the descriptor that its tar comes from, while it is unpacked
Watched = Callable[[str, int], AbstractContextManager[None]]


def _unwatched(_id: str, _fd: int) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load did: the topmost layer, all of them from the base up, and those that it made.

    `name`, `digest` and `config` are the image's; empty for a root file system.
    """

    layer: str
    layers: list[str]
    made: list[str]
    name: str = ""
    digest: str = ""
    config: dict[str, Any] = field(default_factory=dict)


def load(
    client: Client,
    source: str,
    ref: str = "",
    *,
    name: str = "",
    platform: str = "",
    told: Callable[[str, int], None] = lambda id, size: None,
    watched: Watched = _unwatched,
) -> Loaded:
    """Load an image, or a tar of a root file system, from a path; all or nothing.

    `name`: an empty layer of this id is made on top, to be found by it. `told(id, size)` hears of
    each layer that is made. `watched(id, fd)` is entered while a layer is unpacked. Raises
    ImageError, OSError, and what the calls raise.
    """
    with images.opened(source, ref, platform) as found:
        image = _rootfs(found.path) if isinstance(found, RootTar) else found
        return _load(client, image, name, told, watched)


def _load(
    client: Client, found: Image, name: str, told: Callable[[str, int], None], watched: Watched
) -> Loaded:
    ids = [f"sha256-{each.partition(':')[2]}" for each in _chain(found)]
    with _one_at_a_time(client):
        _refuse_name(client, name, ids[-1])
        made: list[str] = []
        try:
            for number, (id, layer) in enumerate(zip(ids, found.layers, strict=True)):
                below = ids[:number]
                if not _is_there(client, id, below):
                    made.append(id)
                    parent = below[-1] if below else ""
                    told(id, _make(client, id, parent, layer, watched))
            if name and not client.exists(name).exists:
                made.append(name)
                client.create(name, parent=ids[-1])
        except BaseException:
            _take_back(client, made)
            raise
    every = [*ids, name] if name else ids
    return Loaded(every[-1], every, made, found.name, found.digest, found.config)


def _chain(image: Image) -> list[str]:
    return images.chain_ids([layer.diff_id for layer in image.layers])


def _refuse_name(client: Client, name: str, top: str) -> None:
    """Raise LayerExists if the name is taken by another image, before anything is made."""
    if not name or not client.exists(name).exists:
        return
    parents = client.get_metadata(name).metadata["parents"].split()
    if parents[:1] != [top]:
        raise LayerExists(f"layer {name} exists already, and does not stand on this image", id=name)


def _is_there(client: Client, id: str, below: Sequence[str]) -> bool:
    """Whether a layer was loaded already. One of an interrupted load is removed."""
    try:
        metadata = client.get_metadata(id).metadata
    except LayerNotFound:
        return False
    if metadata["parents"].split() != [*reversed(below)]:
        raise LayerExists(
            f"layer {id} exists, and was not made of this image: it stands on other layers", id=id
        )
    if metadata["sealed"] == "true":
        return True
    found = client.remove(id, in_use_ok=True)
    if found.reason == "in-use":
        raise LayerExists(
            f"layer {id} is one that a load was cut off at, and it is in use: put it, then load "
            "again",
            id=id,
        )
    return False


def _make(client: Client, id: str, parent: str, layer: ImageLayer, watched: Watched) -> int:
    """Make a layer, checked while it is unpacked, and seal it; how large its content is."""
    client.create(id, parent=parent)
    try:
        with layer.blob.stream() as fd, watched(id, fd):
            found = client.apply_diff(id, _Descriptor(fd), digest=True)
    except BadArchive as error:
        which = layer.digest or layer.diff_id
        raise BadArchive(f"layer {which} of the image: {error.message}", **error.data) from error
    if layer.digest and found.digest != layer.digest:
        raise ImageError(f"the blob {layer.digest} is not what its name says: it is {found.digest}")
    if found.diff_id != layer.diff_id:
        raise ImageError(
            f"a layer is not what the image's configuration says: it is {found.diff_id}, not "
            f"{layer.diff_id}"
        )
    client.seal(id)
    return found.size


def _take_back(client: Client, made: Sequence[str]) -> None:
    for id in reversed(made):
        # one that others stand on by now is whole, and stays; the error that is told is the first
        with suppress(LayerHasChildren, AufsdError, OSError):
            client.remove(id)


@contextmanager
def _one_at_a_time(client: Client) -> Iterator[None]:
    """Wait until no other load runs on this daemon. A killed load releases its lock.

    The lock is on the directory of the daemon's socket. If that may not be read, there is no lock,
    and of two loads of one image one fails with LayerExists.
    """
    try:
        fd = os.open(os.path.dirname(client.path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        yield
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class _Descriptor:
    fd: int

    def fileno(self) -> int:
        return self.fd


# --- a root file system -----------------------------------------------------------------------


def _rootfs(path: str) -> Image:
    """A tar as an image of one layer; it is read once more, as nothing else says its digest."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        start = file.peek(4)[:4]
        if start == _ZSTD:
            raise ImageError(
                f"{path} is packed with zstd: unpack it first (zstd -d), or make a layer of it "
                "with `aufsctl create` and `aufsctl apply`, which read that"
            )
        try:
            if start[:2] == _GZIP:
                with gzip.open(file) as unpacked:
                    while data := unpacked.read(_CHUNK):
                        digest.update(data)
            else:
                while data := file.read(_CHUNK):
                    digest.update(data)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ImageError(f"{path} is cut short, or damaged: {error}") from None
    blob = images.Blob(path, os.path.getsize(path))
    diff_id = f"sha256:{digest.hexdigest()}"
    return Image("", "", {}, (ImageLayer(diff_id, "", blob),))
