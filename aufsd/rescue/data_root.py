"""What Docker knows of its images and containers, read from the files that it keeps.

moby image/fs.go (imagedb), layer/filestore.go (layerdb), reference/store.go (repositories.json) and
container/container.go (config.v2.json). What cannot be read is a problem of the one image or
container that needs it, told in its `problem`, and stops nothing else.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from aufsd.rescue.refused import Refused

# where each driver keeps the content of a layer, below the data root; {} is the layer's cache id
CONTENT: Final = {"aufs": "aufs/diff/{}", "overlay2": "overlay2/{}/diff"}
_HEX = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# what Docker and BuildKit name layers: 64 hex digits, 25 of base 32, and `-init` after them
_CACHE_ID = re.compile(r"[0-9a-z]{10,64}(-init)?")
# a configuration of an image is some kilobytes; its history may make it long
_LARGEST: Final = 64 << 20
NEVER: Final = "0001-01-01T00:00:00Z"  # Go's zero time


class Layer(Struct, frozen=True):
    """A layer of images. `chain` names it with all below it, `diff` its tar, `cache` its content.

    `size` is in bytes, as Docker counted them. `parent` is a chain, "" for a base layer.
    """

    chain: str
    diff: str
    cache: str
    parent: str
    size: int


class Image(Struct, frozen=True):
    """An image. `config` are its configuration's own bytes; their digest is the image's id."""

    id: str
    names: tuple[str, ...]
    config: bytes
    created: str
    # chains, base first
    layers: tuple[str, ...]
    problem: str = ""
    # a step of a build, that another image stands on and that has no name
    intermediate: bool = False


class Container(Struct, frozen=True):
    """A container. `config` is Docker's Config of it, `parent` the chain that it stands on."""

    id: str
    name: str
    # an id, and what the user called it
    image: str
    image_name: str
    created: str
    state: str
    started: str
    finished: str
    command: tuple[str, ...]
    config: dict[str, Any]
    # the cache id of what it holds of its own
    cache: str
    parent: str
    # by where they are mounted
    volumes: Mapping[str, str]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class DataRoot:
    """Docker's data root. `problems` are those of no one image or container."""

    path: Path
    driver: str
    layers: Mapping[str, Layer]
    images: tuple[Image, ...]
    containers: tuple[Container, ...]
    # names of those that Docker manages; their content is not in here
    volumes: tuple[str, ...]
    problems: tuple[str, ...]

    def content(self, cache: str) -> Path:
        """Where the content of a layer lies."""
        return self.path / CONTENT[self.driver].format(cache)

    def tar_split(self, chain: str) -> Path:
        """What is left of the tar that a layer was made of."""
        return self._layer(chain) / "tar-split.json.gz"

    def _layer(self, chain: str) -> Path:
        return self.path / "image" / self.driver / "layerdb" / chain.replace(":", "/")

    def stack(self, chain: str) -> tuple[str, ...]:
        """The chains from the base up to this one, itself included; KeyError if one is missing."""
        found: list[str] = []
        while chain:
            if chain in found:
                raise KeyError(chain)
            found.append(chain)
            chain = self.layers[chain].parent
        return tuple(reversed(found))


def read(path: Path, driver: str = "") -> DataRoot:
    """Read a data root; `driver` says which store if it has several.

    Raises Refused with a sentence if it is none, OSError.
    """
    driver = _driver(path, driver)
    base = path / "image" / driver
    layers, problems = _layers(base / "layerdb")
    names, unread = _names(base / "repositories.json")
    images = tuple(_images(base / "imagedb", names, layers))
    containers, unreadable = _containers(path, base / "layerdb/mounts", driver)
    return DataRoot(
        path,
        driver,
        layers,
        images,
        containers,
        tuple(sorted(entry.name for entry in _listed(path / "volumes") if entry.is_dir())),
        (*problems, *unread, *unreadable),
    )


def _driver(path: Path, wanted: str) -> str:
    found = sorted(entry.name for entry in _listed(path / "image"))
    if not found:
        raise Refused(f"{path} is no data root of Docker: there is nothing in {path}/image")
    known = [name for name in found if name in CONTENT]
    if wanted:
        if wanted not in known:
            raise Refused(f"{path} has no images of the driver {wanted}; it has {', '.join(found)}")
        return wanted
    if not known:
        raise Refused(f"{path} holds images of {', '.join(found)}; aufs and overlay2 are read")
    if len(known) > 1:
        raise Refused(f"{path} holds images of {' and '.join(known)}: choose one with --driver")
    return known[0]


# --- layers ---------------------------------------------------------------------------------------


def _layers(layerdb: Path) -> tuple[dict[str, Layer], list[str]]:
    layers, problems = {}, []
    for entry in _listed(layerdb / "sha256"):
        chain = f"sha256:{entry.name}"
        if not _DIGEST.fullmatch(chain):
            continue
        try:
            layers[chain] = _layer(Path(entry.path), chain)
        except (OSError, ValueError) as error:
            problems.append(f"layer {chain}: {sentence(error)}")
    return layers, problems


def _layer(directory: Path, chain: str) -> Layer:
    parent = _field(directory / "parent", _DIGEST) if (directory / "parent").exists() else ""
    return Layer(
        chain=chain,
        diff=_field(directory / "diff", _DIGEST),
        cache=_field(directory / "cache-id", _CACHE_ID),
        parent=parent,
        size=int(_field(directory / "size", re.compile(r"[0-9]{1,19}"))),
    )


def _field(path: Path, form: re.Pattern[str]) -> str:
    text = _bytes(path, 4096).decode("ascii", "replace").strip()
    if not form.fullmatch(text):
        raise ValueError(f"{path} does not hold what Docker writes there")
    return text


# --- images ---------------------------------------------------------------------------------------


class _Repositories(Struct):
    repositories: dict[str, dict[str, str]] = msgspec.field(name="Repositories")


def _names(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """By image id, the names that it has; one with a digest is no name of an image here."""
    try:
        found = msgspec.json.decode(_bytes(path, _LARGEST), type=_Repositories)
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError) as error:
        return {}, [f"{path}: {sentence(error)}: images are listed without their names"]
    names: dict[str, list[str]] = {}
    for references in found.repositories.values():
        for name, id in sorted(references.items()):
            if "@" not in name:
                names.setdefault(id, []).append(name)
    return names, []


class _RootFs(Struct):
    diff_ids: list[str] = []


class _ImageConfig(Struct):
    created: str = NEVER
    rootfs: _RootFs = msgspec.field(default_factory=_RootFs)


def _images(
    imagedb: Path, names: Mapping[str, Sequence[str]], layers: Mapping[str, Layer]
) -> Iterator[Image]:
    ids = {f"sha256:{entry.name}" for entry in _listed(imagedb / "content/sha256")} | set(names)
    parents = set(_parents(imagedb / "metadata/sha256"))
    for id in sorted(ids):
        if not _DIGEST.fullmatch(id):
            continue
        known = tuple(names.get(id, ()))
        try:
            config = _bytes(imagedb / "content" / id.replace(":", "/"), _LARGEST)
            found = msgspec.json.decode(config, type=_ImageConfig)
        except (OSError, ValueError) as error:
            problem = f"its configuration cannot be read: {sentence(error)}"
            yield Image(id, known, b"", NEVER, (), problem)
            continue
        chains = chain_ids(found.rootfs.diff_ids)
        problem = ""
        if digest(config) != id:
            problem = "its configuration was changed: the digest is another one"
        missing = [chain for chain in chains if chain not in layers]
        if missing:
            problem = f"layer {missing[0]} is not there"
        step = not known and id in parents
        yield Image(id, known, config, found.created, chains, problem, step)


def _parents(metadata: Path) -> Iterator[str]:
    """The images that others were built on."""
    for entry in _listed(metadata):
        with suppress(OSError, ValueError):
            yield _field(Path(entry.path) / "parent", _DIGEST)


def chain_ids(diff_ids: Sequence[str]) -> tuple[str, ...]:
    """The chain that each of these ends (image-spec, config.md, "Layer ChainID")."""
    chains: list[str] = []
    for diff_id in diff_ids:
        chains.append(digest(f"{chains[-1]} {diff_id}".encode()) if chains else diff_id)
    return tuple(chains)


def digest(data: bytes) -> str:
    """The sha256 of some bytes, as OCI writes it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


# --- containers -----------------------------------------------------------------------------------


class _State(Struct, rename="pascal"):
    running: bool = False
    paused: bool = False
    exit_code: int = 0
    started_at: str = NEVER
    finished_at: str = NEVER


class _MountPoint(Struct, rename="pascal"):
    name: str = ""
    source: str = ""


class _ContainerConfig(Struct, rename="pascal"):
    id: str = msgspec.field(name="ID")
    name: str = ""
    created: str = NEVER
    driver: str = ""
    image: str = ""
    path: str = ""
    args: list[str] | None = None
    state: _State = msgspec.field(default_factory=_State)
    config: dict[str, Any] = msgspec.field(default_factory=dict)
    mount_points: dict[str, _MountPoint] | None = None


def _containers(path: Path, mounts: Path, driver: str) -> tuple[tuple[Container, ...], list[str]]:
    containers, problems = [], []
    for entry in _listed(path / "containers"):
        if not _HEX.fullmatch(entry.name):
            continue
        file = Path(entry.path) / "config.v2.json"
        try:
            found = msgspec.json.decode(_bytes(file, _LARGEST), type=_ContainerConfig)
        except (OSError, ValueError) as error:
            problems.append(f"container {entry.name}: {sentence(error)}")
            continue
        if found.driver in ("", driver):
            containers.append(_container(entry.name, found, mounts / entry.name))
    return tuple(sorted(containers, key=lambda container: container.name)), problems


def _container(id: str, found: _ContainerConfig, mount: Path) -> Container:
    cache = parent = problem = ""
    try:
        cache = _field(mount / "mount-id", _CACHE_ID)
        if (mount / "parent").exists():
            parent = _field(mount / "parent", _DIGEST)
    except (OSError, ValueError) as error:
        problem = f"its layer is not known: {sentence(error)}"
    volumes = {
        where: point.name or point.source for where, point in (found.mount_points or {}).items()
    }
    return Container(
        id=id,
        name=found.name.lstrip("/"),
        image=found.image,
        image_name=str(found.config.get("Image", "")),
        created=found.created,
        state=_state(found.state),
        started=found.state.started_at,
        finished=found.state.finished_at,
        command=(found.path, *(found.args or ())),
        config=found.config,
        cache=cache,
        parent=parent,
        volumes=volumes,
        problem=problem,
    )


def _state(state: _State) -> str:
    if state.paused:
        return "paused"
    if state.running:
        return "running"
    return "created" if state.started_at == NEVER else f"exited ({state.exit_code})"


# --- files ----------------------------------------------------------------------------------------


def _listed(path: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _bytes(path: Path, limit: int) -> bytes:
    """A regular file whole, no symlink and no longer than `limit`. Raises OSError, ValueError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} is longer than {limit} bytes")
    return data


def sentence(error: Exception) -> str:
    """An error in words, with the file that it is about."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return str(error)
