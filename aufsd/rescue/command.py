"""`aufsd rescue`: what a data root of Docker's holds, and its images and containers taken out."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aufsd import config as configuration
from aufsd.archive.requests import Settings
from aufsd.kernel import mountinfo, probe
from aufsd.rescue import data_root, images, writing
from aufsd.rescue.data_root import NEVER, Container, DataRoot, Image
from aufsd.rescue.refused import Refused
from aufsd.rescue.writing import Content, Target, Written
from aufsd_client import oci

_SHORT: Final = 12  # digits of an id in a table, as Docker shows them


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks for."""

    root: Path
    driver: str
    names: tuple[str, ...]
    containers: tuple[str, ...]
    all: bool
    list: bool
    json: bool
    oci: str | None
    docker_archive: str | None
    gzip: bool
    config: str | None


def asked(flags: Mapping[str, Any]) -> Asked:
    """The arguments, parsed. Raises Refused if they do not go together."""
    found = Asked(
        root=Path(os.path.realpath(str(flags["docker_root"]))),
        driver=flags["driver"],
        names=tuple(flags["image"]),
        containers=tuple(flags["container"]),
        all=flags["all"],
        list=flags["list"],
        json=flags["json"],
        oci=flags["oci"],
        docker_archive=flags["docker_archive"],
        gzip=flags["gzip"],
        config=flags["config"],
    )
    chosen = bool(found.names or found.containers or found.all)
    target = found.oci is not None or found.docker_archive is not None
    if found.oci is not None and found.docker_archive is not None:
        raise Refused("--oci and --docker-archive are two targets: give one of them")
    if found.gzip and found.oci is None:
        raise Refused("--gzip goes with --oci; a docker archive holds its layers as they are")
    if target and found.list:
        raise Refused("--list writes no images: leave out the target")
    if chosen and not target:
        raise Refused("where to? give --oci DIR or --docker-archive FILE")
    if target and not chosen:
        raise Refused("which ones? give names of images, --container NAME, or --all")
    if found.all and (found.names or found.containers):
        raise Refused("--all is all of them: give no names beside it")
    return found


def run(flags: Mapping[str, Any]) -> int:
    """Do what the arguments say. Exit status: 0 all of it, 1 something could not be, 2 usage."""
    try:
        ask = asked(flags)
    except Refused as refused:
        return _say(str(refused), 2)
    try:
        root = data_root.read(ask.root, ask.driver)
        loaded = configuration.load(ask.config, {})
        settings = Settings(
            uid_maps=loaded.uid_maps,
            gid_maps=loaded.gid_maps,
            acls=loaded.acls,
            namespace="user" if probe.in_user_namespace() else "trusted",
        )
        _warn_of_mounts(root)
        with writing.open_content(root, settings) as content:
            if ask.oci is None and ask.docker_archive is None:
                return _list(content, as_json=ask.json)
            return _rescue(content, ask)
    except Refused as refused:
        return _say(str(refused), 1)


def _warn_of_mounts(root: DataRoot) -> None:
    below = str(root.path / root.driver)
    mounted = [row for row in mountinfo.mounted_under(below) if row.mount_point != below]
    if mounted:
        _say(
            f"warning: {len(mounted)} mounts below {below}: a container that runs is read while "
            "it changes; stop Docker first",
            0,
        )


# --- rescue ---------------------------------------------------------------------------------------


def _rescue(content: Content, ask: Asked) -> int:
    wanted, refused = _wanted(content.root, ask)
    for sentence in refused:
        _say(sentence, 0)
    failed = len(refused)
    done: list[Written] = []
    told: set[str] = set()
    with _target(ask) as target:
        for one in writing.write(content, wanted, target):
            if isinstance(one, str):
                _say(one, 0)
                failed += 1
                continue
            done.append(one)
            for note in one.notes:
                # once, though several images stand on the layer
                if note not in told:
                    _say(f"warning: {note}", 0)
            told.update(one.notes)
            if not ask.json:
                print(f"{' '.join(one.names) or '(no name)'} {one.id}", flush=True)
        target.commit()
    changed = [one for one, asked in _pairs(done, wanted) if asked.id and asked.id != one.id]
    for one in changed:
        _say(f"warning: {one.what} has another id than Docker knew it by: a layer is new", 0)
    if ask.json:
        rows = [{"what": x.what, "id": x.id, "names": x.names, "notes": x.notes} for x in done]
        print(json.dumps({"images": rows, "failed": failed}))
    return 1 if failed else 0


def _pairs(
    done: Sequence[Written], wanted: Sequence[images.Wanted]
) -> Iterator[tuple[Written, images.Wanted]]:
    by_what = {one.what: one for one in wanted}
    for one in done:
        yield one, by_what[one.what]


def _wanted(root: DataRoot, ask: Asked) -> tuple[list[images.Wanted], list[str]]:
    """What is to be written, and why some of it cannot be."""
    found_images: Sequence[Image] = _whole(root)
    found_containers: Sequence[Container] = root.containers
    if not ask.all:
        found_images = list(dict.fromkeys(images.named(root, name) for name in ask.names))
        found_containers = [images.container_named(root, name) for name in ask.containers]
    wanted, refused = [], []
    for image in found_images:
        try:
            wanted.append(images.image(root, image))
        except Refused as error:
            refused.append(str(error))
    for container in found_containers:
        try:
            wanted.append(images.container(root, container, oci.this_machine()))
        except Refused as error:
            refused.append(str(error))
    return list(images.distinct(wanted)), refused


@contextmanager
def _target(ask: Asked) -> Iterator[Target]:
    if ask.oci is not None:
        yield writing.oci_layout(ask.oci, compress=ask.gzip)
    else:
        with writing.docker_archive(str(ask.docker_archive)) as archive:
            yield archive


# --- list -----------------------------------------------------------------------------------------


def _list(content: Content, *, as_json: bool) -> int:
    root = content.root
    sizes = {container.id: _own_size(content, container) for container in root.containers}
    if as_json:
        print(json.dumps(_rows(root, sizes)))
        return 0
    print(f"{root.path}: Docker's, driver {root.driver}, {len(root.layers)} layers of images\n")
    _table(
        ("IMAGE", "ID", "CREATED", "SIZE"),
        [
            (name, _short(image.id), _day(image.created), _size(_image_size(root, image)))
            for image in _whole(root)
            for name in (image.names or ("(no name)",))
        ],
    )
    _table(
        ("CONTAINER", "ID", "IMAGE", "STATE", "LAST RUN", "OWN SIZE"),
        [
            (
                container.name,
                _short(container.id),
                container.image_name or _short(container.image),
                container.state,
                _day(_last_run(container)),
                _size(sizes[container.id]),
            )
            for container in root.containers
        ],
    )
    if root.volumes:
        print(f"{len(root.volumes)} volumes, whose content is in no image: {root.path}/volumes")
        _table(
            ("VOLUME", "USED BY"),
            [(volume, ", ".join(_users(root, volume)) or "-") for volume in root.volumes],
        )
    for sentence in _problems(root):
        print(f"damaged: {sentence}")
    return 0


def _rows(root: DataRoot, sizes: Mapping[str, int | None]) -> dict[str, Any]:
    return {
        "root": str(root.path),
        "driver": root.driver,
        "images": [
            {
                "id": image.id,
                "names": image.names,
                "created": image.created,
                "size": _image_size(root, image),
                "layers": len(image.layers),
                "intermediate": image.intermediate,
                "problem": image.problem,
            }
            for image in root.images
        ],
        "containers": [
            {
                "id": container.id,
                "name": container.name,
                "image": container.image,
                "image_name": container.image_name,
                "state": container.state,
                "created": container.created,
                "last_run": _last_run(container),
                "own_size": sizes[container.id],
                "volumes": container.volumes,
                "problem": container.problem,
            }
            for container in root.containers
        ],
        "volumes": root.volumes,
        "problems": _problems(root),
    }


def _whole(root: DataRoot) -> list[Image]:
    """The images but for steps of builds, as `docker images` shows them."""
    return [image for image in root.images if not image.intermediate]


def _own_size(content: Content, container: Container) -> int | None:
    try:
        return content.own_size(container.cache) if container.cache else None
    except (Refused, OSError):
        return None


def _image_size(root: DataRoot, image: Image) -> int:
    return sum(root.layers[chain].size for chain in image.layers if chain in root.layers)


def _last_run(container: Container) -> str:
    """When it ended, or began if it has not ended; "" if it never ran."""
    for time in (container.finished, container.started):
        if time != NEVER:
            return time
    return ""


def _users(root: DataRoot, volume: str) -> list[str]:
    return [one.name for one in root.containers if volume in one.volumes.values()]


def _problems(root: DataRoot) -> list[str]:
    return [
        *root.problems,
        *(f"image {(*one.names, one.id)[0]}: {one.problem}" for one in root.images if one.problem),
        *(f"container {one.name}: {one.problem}" for one in root.containers if one.problem),
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    print()


def _short(id: str) -> str:
    return id.removeprefix("sha256:")[:_SHORT]


def _day(time: str) -> str:
    return "never" if time in ("", NEVER) else time[:10]


def _size(count: int | None) -> str:
    """Decimal units, as Docker has them."""
    if count is None:
        return "unknown"
    size, unit = float(count), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, bigger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _say(sentence: str, status: int) -> int:
    print(f"aufsd: {sentence}", file=sys.stderr)
    return status
