"""Which images are to be written, and what of: images of Docker's, and containers as images.

Pure: a container becomes what `docker commit` would make of it (moby daemon/commit.go), an image on
its image's layers with its own on top.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aufsd.rescue.data_root import NEVER, Container, DataRoot, Image, digest
from aufsd.rescue.refused import Refused

# in the images that containers become: which one it was
NAME_LABEL: Final = "aufsd.container.name"
ID_LABEL: Final = "aufsd.container.id"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a layer comes from: `chain` of an image's layer, "" for what a container holds."""

    cache: str
    chain: str = ""
    diff: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image to be written. `what` is for messages, `config` what it is if no layer changed."""

    what: str
    id: str
    names: tuple[str, ...]
    layers: tuple[Source, ...]
    config: bytes

    def configured(self, diff_ids: Sequence[str]) -> bytes:
        """The configuration with these layers: the very bytes if they are the image's own."""
        if [source.diff for source in self.layers] == list(diff_ids):
            return self.config
        config = json.loads(self.config)
        config["rootfs"] = {"type": "layers", "diff_ids": list(diff_ids)}
        return compact(config)


def image(root: DataRoot, found: Image) -> Wanted:
    """An image as Docker has it. Raises Refused if it cannot be written."""
    what = found.names[0] if found.names else found.id
    if found.problem:
        raise Refused(f"image {what}: {found.problem}")
    return Wanted(
        f"image {what}", found.id, found.names, _sources(root, found.layers), found.config
    )


def container(root: DataRoot, found: Container, architecture: str) -> Wanted:
    """A container as an image. Raises Refused if it cannot be written.

    `architecture` is for one whose image is gone, and so its configuration.
    """
    what = f"container {found.name}"
    if found.problem:
        raise Refused(f"{what}: {found.problem}")
    try:
        stack = root.stack(found.parent)
    except KeyError as missing:
        raise Refused(f"{what}: layer {missing.args[0]} below it is not there") from None
    sources = (*_sources(root, stack), Source(found.cache))
    below = next((one for one in root.images if one.id == found.image and not one.problem), None)
    config = _committed(found, below, [source.diff for source in sources[:-1]], architecture)
    return Wanted(what, "", (_repository(found),), sources, compact(config))


def _sources(root: DataRoot, chains: Sequence[str]) -> tuple[Source, ...]:
    layers = [root.layers[chain] for chain in chains]
    return tuple(Source(layer.cache, layer.chain, layer.diff) for layer in layers)


def _repository(found: Container) -> str:
    """A name that a registry takes: lower case, single separators."""
    name = re.sub(r"[^a-z0-9]+", "-", found.name.lower()).strip("-")
    return f"rescued/{name or found.id[:12]}:latest"


def _committed(
    found: Container, below: Image | None, diff_ids: Sequence[str], architecture: str
) -> dict[str, Any]:
    base: dict[str, Any] = (
        json.loads(below.config)
        if below is not None and below.layers and below.layers[-1] == found.parent
        else {"architecture": architecture, "os": "linux", "history": []}
    )
    created = found.created if found.finished == NEVER else found.finished
    config = dict(found.config)
    labels = config.get("Labels") or {}
    config["Labels"] = {**labels, NAME_LABEL: found.name, ID_LABEL: found.id}
    entry = {
        "created": created,
        "created_by": " ".join(found.command),
        "comment": f"container {found.name}",
    }
    return {
        **base,
        "config": config,
        "container": found.id,
        "created": created,
        "history": [*(base.get("history") or []), entry],
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
    }


def compact(config: object) -> bytes:
    """JSON without blanks, the same bytes for the same content."""
    return json.dumps(config, separators=(",", ":")).encode()


# --- choosing -------------------------------------------------------------------------------------


def named(root: DataRoot, wanted: str) -> Image:
    """The image of a name, with or without a tag, or of an id or its beginning. Raises Refused."""
    for name in (wanted, f"{wanted}:latest"):
        for found in root.images:
            if name in found.names:
                return found
    if re.fullmatch(r"(sha256:)?[0-9a-f]{4,64}", wanted):
        prefix = f"sha256:{wanted.removeprefix('sha256:')}"
        matching = [found for found in root.images if found.id.startswith(prefix)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise Refused(f"{wanted} begins the ids of {len(matching)} images: give more of it")
    raise Refused(f"there is no image {wanted}; without a name `aufsd rescue` lists what is there")


def container_named(root: DataRoot, wanted: str) -> Container:
    """The container of a name, or of an id or its beginning. Raises Refused."""
    for found in root.containers:
        if found.name == wanted.lstrip("/"):
            return found
    if re.fullmatch(r"[0-9a-f]{4,64}", wanted):
        matching = [found for found in root.containers if found.id.startswith(wanted)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise Refused(f"{wanted} begins the ids of {len(matching)} containers: give more of it")
    raise Refused(f"there is no container {wanted}; `aufsd rescue` alone lists what is there")


def distinct(wanted: Sequence[Wanted]) -> Iterator[Wanted]:
    """The same, with every name given once: a name that comes again gets a part of a digest."""
    taken: set[str] = set()
    for one in wanted:
        names = []
        for name in one.names:
            fresh = name
            if fresh in taken:
                repository, _, tag = name.rpartition(":")
                fresh = f"{repository}-{digest(one.config)[7:19]}:{tag}"
            taken.add(fresh)
            names.append(fresh)
        yield Wanted(one.what, one.id, tuple(names), one.layers, one.config)
