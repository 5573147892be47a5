"""`aufsd rescue` over a data root that dockerd wrote: the list, and images with the same ids."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.rescue import data

pytestmark = pytest.mark.root

BASE, APP, AGAIN, THREE = (
    *("sample/base:1", "sample/app:2"),
    *("again.example/app:latest", "sample/three:latest"),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "docker"
    place.mkdir()
    return data.unpack(place)


def digest(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


class Archive:
    """A docker archive, read as `docker load` does."""

    def __init__(self, path: Path) -> None:
        with tarfile.open(path) as archive:
            self.files = {
                member.name: file.read()
                for member in archive
                if (file := archive.extractfile(member)) is not None
            }
        self.manifest: list[dict[str, Any]] = json.loads(self.files["manifest.json"])

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.manifest if name in (row["RepoTags"] or ()))

    def id(self, name: str) -> str:
        return digest(self.files[self.row(name)["Config"]])

    def config(self, name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.files[self.row(name)["Config"]])
        return loaded

    def layers(self, name: str) -> list[bytes]:
        return [self.files[layer] for layer in self.row(name)["Layers"]]

    def is_sound(self, name: str) -> bool:
        """Whether the layers are those that the configuration says."""
        said: list[str] = self.config(name)["rootfs"]["diff_ids"]
        return [digest(layer) for layer in self.layers(name)] == said


def entries(layer: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        return {member.name: member for member in archive}


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = os.path.join(directory, name)
            stat = os.lstat(path)
            found[path] = (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
    return found


# --- the list -------------------------------------------------------------------------------------


def test_the_list_says_what_is_there(root: Path) -> None:
    done = data.rescue(root)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for name, id in data.ids(root).items():
        assert any(
            line.startswith(name) and id[7:19] in line for line in done.stdout.splitlines()
        ), name
    assert "Two_2" in done.stdout
    assert "exited (3)" in done.stdout
    assert "vol" in done.stdout
    assert data.rescue(root, "--list").stdout == done.stdout


def test_the_list_as_json_has_the_same_and_more(root: Path) -> None:
    found = json.loads(data.rescue(root, "--json").stdout)
    assert found["driver"] == "overlay2"
    names = {name: row["id"] for row in found["images"] for name in row["names"]}
    assert names == data.ids(root)
    containers = {row["name"]: row for row in found["containers"]}
    assert set(containers) == {"one", "Two_2", "never"}
    # more than what it was made of: `hello` was copied up, and a line added to it
    assert containers["one"]["own_size"] == len("hello\nmore\n") + len("n\n")
    assert containers["never"]["last_run"] == ""
    assert containers["never"]["volumes"] == {"/data": "vol"}
    assert not found["problems"]


def test_nothing_is_written_to_the_data_root(root: Path, tmp_path: Path) -> None:
    before = snapshot(root)
    assert data.rescue(root).returncode == 0
    assert data.rescue(root, "--all", "--oci", tmp_path / "oci").returncode == 0
    assert snapshot(root) == before


def test_what_is_damaged_is_told_and_stops_nothing(root: Path) -> None:
    id = data.ids(root)[APP]
    (root / "image/overlay2/imagedb/content" / id.replace(":", "/")).write_text("{")
    container = next((root / "containers").iterdir()) / "config.v2.json"
    container.write_text('{"State": 5}')
    done = data.rescue(root)
    assert done.returncode == 0
    said = [line for line in done.stdout.splitlines() if line.startswith("damaged: ")]
    assert len(said) == 2
    assert any(AGAIN in line and "configuration" in line for line in said)
    assert any(container.parent.name in line for line in said)
    assert BASE in done.stdout


# --- images ---------------------------------------------------------------------------------------


def test_images_keep_their_ids_in_an_archive(root: Path, tmp_path: Path) -> None:
    done = data.rescue(root, "--all", "--docker-archive", tmp_path / "all.tar")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    archive = Archive(tmp_path / "all.tar")
    for name, id in data.ids(root).items():
        assert archive.id(name) == id
        assert archive.is_sound(name)
        assert f"{id}\n" in done.stdout
    # two names of one image are two names, not two images
    assert archive.row(APP) == archive.row(AGAIN)


def test_images_keep_their_ids_in_a_layout(root: Path, tmp_path: Path) -> None:
    layout = tmp_path / "oci"
    assert data.rescue(root, "--all", "--oci", layout).returncode == 0
    index = json.loads((layout / "index.json").read_text())
    found = {}
    for row in index["manifests"]:
        manifest = json.loads((layout / "blobs" / row["digest"].replace(":", "/")).read_text())
        name = row["annotations"]["org.opencontainers.image.ref.name"]
        found[name] = manifest["config"]["digest"]
        config = layout / "blobs" / manifest["config"]["digest"].replace(":", "/")
        diff_ids = json.loads(config.read_text())["rootfs"]["diff_ids"]
        assert [layer["digest"] for layer in manifest["layers"]] == diff_ids
        for layer in manifest["layers"]:
            blob = (layout / "blobs" / layer["digest"].replace(":", "/")).read_bytes()
            assert (digest(blob), len(blob)) == (layer["digest"], layer["size"])
    assert {name: id for name, id in found.items() if not name.startswith("rescued/")} == (
        data.ids(root)
    )


def test_a_compressed_layer_has_the_same_tar(root: Path, tmp_path: Path) -> None:
    layout = tmp_path / "oci"
    assert data.rescue(root, THREE, "--oci", layout, "--gzip").returncode == 0
    row = json.loads((layout / "index.json").read_text())["manifests"][0]
    manifest = json.loads((layout / "blobs" / row["digest"].replace(":", "/")).read_text())
    assert manifest["config"]["digest"] == data.ids(root)[THREE]
    assert {layer["mediaType"].rpartition("+")[2] for layer in manifest["layers"]} == {"gzip"}


@pytest.mark.parametrize("short", [False, True])
def test_an_image_is_named_by_its_id_too(root: Path, tmp_path: Path, short: bool) -> None:
    id = data.ids(root)[THREE]
    given = id[7:15] if short else id
    assert data.rescue(root, given, "--docker-archive", tmp_path / "one.tar").returncode == 0
    assert len(Archive(tmp_path / "one.tar").manifest) == 1
    assert Archive(tmp_path / "one.tar").id(THREE) == id


def test_latest_is_the_tag_of_a_name_without_one(root: Path, tmp_path: Path) -> None:
    done = data.rescue(root, "sample/three", "--docker-archive", tmp_path / "one.tar")
    assert done.returncode == 0
    assert Archive(tmp_path / "one.tar").id(THREE) == data.ids(root)[THREE]


# --- containers -----------------------------------------------------------------------------------


def test_a_container_is_an_image_on_its_images_layers(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.tar"
    assert data.rescue(root, "--container", "Two_2", "--docker-archive", out).returncode == 0
    archive = Archive(out)
    name = "rescued/two-2:latest"
    assert archive.is_sound(name)
    below = data.config(root, data.ids(root)[APP])
    config = archive.config(name)
    assert config["rootfs"]["diff_ids"][:-1] == below["rootfs"]["diff_ids"]
    assert config["history"][:-1] == below["history"]
    assert config["config"]["Env"] == ["A=b"]
    labels = config["config"]["Labels"]
    assert labels["l"] == "m"
    assert labels["aufsd.container.name"] == "Two_2"
    own = entries(archive.layers(name)[-1])
    assert {"new/q", "keep/.wh.blob", "etc/passwd", "new/.wh..wh..opq"} <= set(own)
    assert own["etc/passwd"].mode & 0o777 == 0o600


def test_a_container_by_the_beginning_of_its_id(root: Path, tmp_path: Path) -> None:
    id = next((root / "containers").iterdir()).name
    out = tmp_path / "c.tar"
    assert data.rescue(root, "--container", id[:6], "--docker-archive", out).returncode == 0
    (row,) = Archive(out).manifest
    config = json.loads(Archive(out).files[row["Config"]])
    assert config["config"]["Labels"]["aufsd.container.id"] == id


def test_a_container_whose_image_is_gone_still_has_its_layers(root: Path, tmp_path: Path) -> None:
    id = data.ids(root)[BASE]
    (root / "image/overlay2/imagedb/content" / id.replace(":", "/")).unlink()
    out = tmp_path / "c.tar"
    assert data.rescue(root, "--container", "one", "--docker-archive", out).returncode == 0
    archive = Archive(out)
    assert archive.is_sound("rescued/one:latest")
    assert len(archive.layers("rescued/one:latest")) == 2
    assert archive.config("rescued/one:latest")["os"] == "linux"


# --- damage ---------------------------------------------------------------------------------------


def edit_in_place(path: Path, raw: bytes) -> None:
    times = path.stat()
    path.write_bytes(raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def change(path: Path) -> str:
    edit_in_place(path, b"X" * path.stat().st_size)
    return "its content was changed"


def shorten(path: Path) -> str:
    os.truncate(path, 3)
    return "it has 3 bytes"


def delete(path: Path) -> str:
    path.unlink()
    return "it is gone"


def lead_out(path: Path) -> str:
    """A file of the size it was, outside of the layer."""
    size = path.stat().st_size
    path.unlink()
    outside = path.parent.parent.parent.parent.parent / "secret"
    outside.write_bytes(b"s" * size)
    path.symlink_to(outside)
    return "it is gone"


@pytest.mark.parametrize("damage", [change, shorten, delete, lead_out])
def test_a_file_that_was_damaged_is_named_and_its_layer_written_anew(
    root: Path, tmp_path: Path, damage: Any
) -> None:
    first = data.config(root, data.ids(root)[BASE])["rootfs"]["diff_ids"][0]
    what = damage(data.content(root, first) / "etc/passwd")
    out = tmp_path / "all.tar"
    done = data.rescue(root, "--all", "--docker-archive", out)
    assert done.returncode == 0
    assert f"layer {first} is written anew: etc/passwd: {what}" in done.stderr
    assert "has another id than Docker knew it by" in done.stderr
    archive = Archive(out)
    assert b"s" * 20 not in archive.layers(BASE)[0]
    for name, id in data.ids(root).items():
        assert archive.id(name) != id
        assert archive.is_sound(name)
    # what was not damaged is as it was
    assert (
        archive.config(APP)["rootfs"]["diff_ids"][1]
        == data.config(root, data.ids(root)[APP])["rootfs"]["diff_ids"][1]
    )
    assert "usr/bin/tool" in entries(archive.layers(BASE)[0])


@pytest.mark.parametrize("cut", [None, 40])
def test_without_the_record_of_its_tar_a_layer_is_written_anew(
    root: Path, tmp_path: Path, cut: int | None
) -> None:
    first = data.config(root, data.ids(root)[BASE])["rootfs"]["diff_ids"][0]
    record = data.tar_split(root, first)
    if cut is None:
        record.unlink()
    else:
        os.truncate(record, cut)
    out = tmp_path / "base.tar"
    done = data.rescue(root, BASE, "--docker-archive", out)
    assert done.returncode == 0
    assert "record of its tar" in done.stderr
    archive = Archive(out)
    assert archive.is_sound(BASE)
    assert archive.config(BASE)["config"] == data.config(root, data.ids(root)[BASE])["config"]


def test_a_layer_that_is_gone_stops_its_images_alone(root: Path, tmp_path: Path) -> None:
    last = data.config(root, data.ids(root)[THREE])["rootfs"]["diff_ids"][-1]
    place = data.content(root, last)
    place.rename(place.parent / "elsewhere")
    out = tmp_path / "all.tar"
    done = data.rescue(root, "--all", "--docker-archive", out)
    assert done.returncode == 1
    assert f"image {THREE}: its layer {last} is gone" in done.stderr
    archive = Archive(out)
    assert archive.id(BASE) == data.ids(root)[BASE]
    assert not [row for row in archive.manifest if THREE in (row["RepoTags"] or ())]


def test_a_changed_configuration_is_not_passed_off_as_the_image(root: Path, tmp_path: Path) -> None:
    path = root / "image/overlay2/imagedb/content" / data.ids(root)[BASE].replace(":", "/")
    path.write_text(path.read_text().replace("A=b", "A=c"))
    done = data.rescue(root, BASE, "--docker-archive", tmp_path / "base.tar")
    assert done.returncode == 1
    assert "its configuration was changed" in done.stderr


# --- what is asked for wrongly --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--all"], "where to?"),
        (["--oci", "x"], "which ones?"),
        (["--all", "--oci", "x", "--docker-archive", "y"], "two targets"),
        (["--all", "--docker-archive", "y", "--gzip"], "--gzip goes with --oci"),
        (["--list", "--oci", "x"], "--list writes no images"),
        ([BASE, "--all", "--oci", "x"], "--all is all of them"),
    ],
)
def test_what_does_not_go_together_is_refused(root: Path, arguments: list[str], said: str) -> None:
    done = data.rescue(root, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "there is no image nothing"),
        (["--container", "nobody"], "there is no container nobody"),
        (["--driver", "aufs"], "no images of the driver aufs"),
    ],
)
def test_what_is_not_there_is_told(
    root: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    target = [] if arguments[0] == "--driver" else ["--docker-archive", tmp_path / "x.tar"]
    done = data.rescue(root, *arguments, *target)
    assert done.returncode == 1
    assert said in done.stderr
    assert not (tmp_path / "x.tar").exists()


def test_a_directory_that_is_no_data_root_is_told(tmp_path: Path) -> None:
    done = data.rescue(tmp_path)
    assert done.returncode == 1
    assert "is no data root of Docker" in done.stderr


def test_an_archive_that_cannot_be_written_leaves_nothing(root: Path, tmp_path: Path) -> None:
    done = data.rescue(root, "--all", "--docker-archive", tmp_path / "missing/x.tar")
    assert done.returncode == 1
    assert "missing" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["docker"]


def test_an_old_archive_stays_until_the_new_one_is_whole(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.tar"
    out.write_text("a backup")
    assert data.rescue(root, "nothing", "--docker-archive", out).returncode == 1
    assert out.read_text() == "a backup"
