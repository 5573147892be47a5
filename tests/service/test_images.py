"""Images that other tools wrote, loaded into a real daemon."""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aufsd_client import Client, errors, loading
from aufsd_client.blobs import ImageError
from aufsd_client.cli.__main__ import run
from tests.archives import tar
from tests.daemon import Daemon, daemon

pytestmark = pytest.mark.service

BASE = tar({"etc": None, "etc/motd": b"hello", "gone": b"g"})
TOP = tar({"etc/motd": b"changed", ".wh.gone": b"", "new": b"n" * 100_000})


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.fixture
def layout(client: Client, tmp_path: Path) -> Path:
    """What our own export writes of two layers, gzipped."""
    client.create("base")
    client.apply_diff("base", BASE)
    client.create("top", parent="base")
    client.apply_diff("top", TOP)
    made = tmp_path / "layout"
    assert run(["--socket", client.path, "export", "--oci", str(made), "--gzip", "top"]) == 0
    return made


def copied(layout: Path, to: str) -> str:
    """By skopeo; the path it copied to."""
    command = ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{layout}:top", to]
    subprocess.run(command, check=True)
    return to.split(":")[1]


def view(client: Client, id: str) -> dict[str, bytes]:
    with client.mounted(id) as path:
        found = [each for each in Path(path).rglob("*") if each.is_file()]
        return {str(each.relative_to(path)): each.read_bytes() for each in found}


def ids(client: Client) -> set[str]:
    return {row.id for row in client.iter_layers()}


# --- what others write ----------------------------------------------------------------------------

FORMS = ("oci:{}", "oci-archive:{}", "dir:{}", "docker-archive:{}:some/image:1.0")


@pytest.mark.oci
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.split(":")[0])
def test_what_skopeo_writes_shows_the_same_and_is_found_again(
    client: Client, layout: Path, tmp_path: Path, form: str
) -> None:
    expected = view(client, "top")
    source = copied(layout, form.format(tmp_path / "copy"))
    before = ids(client)
    first = loading.load(client, source)
    assert view(client, first.layer) == expected
    assert first.made == first.layers
    assert ids(client) - before == set(first.layers)
    config = json.loads(next(one for one in blobs(layout) if b'"diff_ids"' in one))
    assert first.config["rootfs"] == config["rootfs"]
    assert [client.diff(id, bytearray(), digest=True).diff_id for id in first.layers] == (
        config["rootfs"]["diff_ids"]
    )
    again = loading.load(client, source)
    assert (again.layer, again.made) == (first.layer, [])


def blobs(layout: Path) -> list[bytes]:
    return [each.read_bytes() for each in (layout / "blobs/sha256").iterdir()]


@pytest.mark.oci
def test_an_archive_that_is_compressed_as_a_whole(
    client: Client, layout: Path, tmp_path: Path
) -> None:
    source = Path(copied(layout, f"docker-archive:{tmp_path}/copy:some/image:1.0"))
    packed = tmp_path / "copy.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    assert loading.load(client, str(packed), "some/image:1.0").name.endswith("some/image:1.0")


@pytest.mark.oci
def test_zstd(client: Client, layout: Path, tmp_path: Path) -> None:
    command = ["skopeo", "--insecure-policy", "copy", "-q", "--dest-compress-format", "zstd"]
    subprocess.run([*command, f"oci:{layout}:top", f"oci:{tmp_path}/copy:x"], check=True)
    kinds = [one for one in blobs(tmp_path / "copy") if b"tar+zstd" in one]
    assert kinds
    assert view(client, loading.load(client, f"{tmp_path}/copy").layer) == view(client, "top")


# --- docker save, in both formats -----------------------------------------------------------------


def config_of(*layers: bytes) -> bytes:
    rootfs = {"type": "layers", "diff_ids": [digest(each) for each in layers]}
    return json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs}).encode()


def archive(path: Path, files: dict[str, bytes | str]) -> str:
    """A tar of files, and of symbolic links where the value is text."""
    with tarfile.open(path, "w") as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                out.addfile(info)
            else:
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
    return str(path)


def saved(path: Path, *, names: tuple[str, ...] = ("some/image:latest",)) -> str:
    """As docker save wrote it before Docker 25: the second layer is a link to the first."""
    config = config_of(BASE, TOP, BASE)
    own, one, two, three = (each * 64 for each in "abcd")
    own = digest(config)[7:]
    manifest = [
        {
            "Config": f"{own}.json",
            "RepoTags": [name],
            "Layers": [f"{one}/layer.tar", f"{two}/layer.tar", f"{three}/layer.tar"],
        }
        for name in names
    ]
    return archive(
        path,
        {
            f"{one}/VERSION": b"1.0",
            f"{one}/layer.tar": BASE,
            f"{two}/layer.tar": TOP,
            f"{three}/layer.tar": f"../{one}/layer.tar",
            f"{own}.json": config,
            "manifest.json": json.dumps(manifest).encode(),
            "repositories": b"{}",
        },
    )


def test_docker_save_before_25(client: Client, tmp_path: Path) -> None:
    found = loading.load(client, saved(tmp_path / "saved"), "some/image")
    assert len(found.layers) == 3
    assert view(client, found.layer)["etc/motd"] == b"hello"
    assert found.name == "some/image:latest"


def test_docker_save_since_25(client: Client, tmp_path: Path) -> None:
    config = config_of(BASE, TOP)
    paths = [f"blobs/sha256/{digest(each)[7:]}" for each in (config, BASE, TOP)]
    rows = [{"Config": paths[0], "RepoTags": None, "Layers": paths[1:]}]
    source = archive(
        tmp_path / "saved",
        {
            "blobs/sha256": "",
            **dict(zip(paths, (config, BASE, TOP), strict=True)),
            "index.json": b"{}",
            "manifest.json": json.dumps(rows).encode(),
            "oci-layout": b"{}",
        },
    )
    found = loading.load(client, source)
    assert view(client, found.layer)["etc/motd"] == b"changed"
    # the same layers, whatever tool wrote the image
    assert loading.load(client, saved(tmp_path / "old")).layers[:2] == found.layers


def test_which_image_has_to_be_said(client: Client, tmp_path: Path) -> None:
    source = saved(tmp_path / "saved", names=("a:1", "b:1"))
    with pytest.raises(ImageError, match="2 images in it: say which of a:1, b:1"):
        loading.load(client, source)
    with pytest.raises(ImageError, match="no image c in it; it has a:1, b:1"):
        loading.load(client, source, "c")
    assert loading.load(client, source, "b:1").name == "b:1"


def test_the_layer_of_a_name_stands_on_the_image(client: Client, tmp_path: Path) -> None:
    source = saved(tmp_path / "saved")
    found = loading.load(client, source, name="debian")
    assert (found.layer, found.layers[-1], found.made[-1]) == ("debian",) * 3
    assert not client.get("debian").read_only
    assert loading.load(client, source, name="debian").made == []
    client.create("taken")
    with pytest.raises(errors.LayerExists, match="taken"):
        loading.load(client, source, name="taken")


# --- several platforms ----------------------------------------------------------------------------


def put(root: Path, content: bytes, kind: str, **more: object) -> dict[str, object]:
    (root / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    (root / "blobs/sha256" / digest(content)[7:]).write_bytes(content)
    return {"mediaType": kind, "digest": digest(content), "size": len(content), **more}


OCI = "application/vnd.oci.image."


def image(root: Path, layer: bytes, kind: str = "layer.v1.tar", **more: object) -> dict[str, Any]:
    """A manifest of one layer; its descriptor."""
    manifest = {
        "schemaVersion": 2,
        "config": put(root, config_of(layer), f"{OCI}config.v1+json"),
        "layers": [put(root, layer, f"{OCI}{kind}")],
    }
    return put(root, json.dumps(manifest).encode(), f"{OCI}manifest.v1+json", **more)


def index(root: Path, *rows: dict[str, Any]) -> str:
    (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": rows}))
    (root / "oci-layout").write_text("{}")
    return str(root)


def of(architecture: str) -> dict[str, str]:
    return {"os": "linux", "architecture": architecture}


def test_this_machines_image_is_taken_or_the_one_that_is_named(
    client: Client, tmp_path: Path
) -> None:
    rows = [
        image(tmp_path, BASE, platform=of("amd64")),
        image(tmp_path, TOP, platform=of("s390x")),
        image(tmp_path, TOP, annotations={"vnd.docker.reference.type": "attestation-manifest"}),
    ]
    content = json.dumps({"schemaVersion": 2, "manifests": rows}).encode()
    source = index(tmp_path, put(tmp_path, content, f"{OCI}index.v1+json"))
    found = loading.load(client, source, platform="linux/s390x")
    assert found.layer == f"sha256-{digest(TOP)[7:]}"
    assert loading.load(client, source, platform="linux/amd64").layer != found.layer
    with pytest.raises(ImageError, match="no image for linux/arm; it has linux/amd64, linux/s390x"):
        loading.load(client, source, platform="linux/arm")


# --- a broken image leaves nothing ----------------------------------------------------------------


def break_blob(root: Path, content: bytes) -> None:
    (root / "blobs/sha256" / digest(content)[7:]).write_bytes(tar({"other": b""}))


def break_config(root: Path) -> None:
    path = root / "blobs/sha256" / digest(config_of(BASE))[7:]
    path.write_bytes(path.read_bytes().replace(b"amd64", b"arm64"))


def lie_in_config(root: Path) -> None:
    manifest = {
        "schemaVersion": 2,
        "config": put(root, config_of(TOP), f"{OCI}config.v1+json"),
        "layers": [put(root, BASE, f"{OCI}layer.v1.tar")],
    }
    index(root, put(root, json.dumps(manifest).encode(), f"{OCI}manifest.v1+json"))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "blob changed": (lambda root: break_blob(root, BASE), "is not what its name says"),
    "blob missing": (lambda root: shutil.rmtree(root / "blobs"), "is missing"),
    "configuration changed": (break_config, "is not what its name says"),
    "another layer": (lie_in_config, "not what the image's configuration says"),
    "no JSON": (lambda root: (root / "index.json").write_text("{"), "is not JSON"),
    "no list": (lambda root: (root / "index.json").write_text("{}"), "no list manifests"),
    "no index": (lambda root: (root / "index.json").unlink(), "is no image"),
    "encrypted": (
        lambda root: index(root, image(root, BASE, "layer.v1.tar+encrypted")),
        "cannot be unpacked: .*encrypted",
    ),
    "no tar": (lambda root: index(root, image(root, b"x" * 2000)), "of the image: "),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_image_is_told_and_leaves_no_layer(
    client: Client, tmp_path: Path, how: str
) -> None:
    root = tmp_path / "image"
    root.mkdir()
    index(root, image(root, BASE))
    act, said = BROKEN[how]
    act(root)
    with pytest.raises((ImageError, errors.AufsdError), match=said):
        loading.load(client, str(root))
    assert ids(client) == set()


def test_a_second_layer_that_is_broken_takes_the_first_with_it(
    client: Client, tmp_path: Path
) -> None:
    config = config_of(BASE, TOP)
    manifest = {
        "schemaVersion": 2,
        "config": put(tmp_path, config, f"{OCI}config.v1+json"),
        "layers": [put(tmp_path, each, f"{OCI}layer.v1.tar") for each in (BASE, TOP)],
    }
    source = index(tmp_path, put(tmp_path, json.dumps(manifest).encode(), f"{OCI}manifest.v1+json"))
    break_blob(tmp_path, TOP)
    with pytest.raises(ImageError):
        loading.load(client, source)
    assert ids(client) == set()


def test_a_foreign_layer_that_is_not_there_is_named(client: Client, tmp_path: Path) -> None:
    row = image(tmp_path, BASE, "layer.nondistributable.v1.tar")
    (tmp_path / "blobs/sha256" / digest(BASE)[7:]).unlink()
    with pytest.raises(ImageError, match="is foreign and not in it"):
        loading.load(client, index(tmp_path, row))


def test_what_was_cut_off_is_made_anew(client: Client, tmp_path: Path) -> None:
    """A layer without its seal, as kill -9 leaves one."""
    source = saved(tmp_path / "saved")
    first = loading.load(client, source)
    for id in reversed(first.layers[1:]):
        client.remove(id)
    client.create(first.layers[1], parent=first.layers[0])
    client.apply_diff(first.layers[1], tar({"half": b""}))
    again = loading.load(client, source)
    assert again.made == first.layers[1:]
    assert "half" not in view(client, again.layer)


def test_an_archive_that_is_cut_short_leaves_no_layer(client: Client, tmp_path: Path) -> None:
    source = Path(saved(tmp_path / "saved"))
    whole = source.read_bytes()
    for size in range(0, len(whole), 40_000):
        source.write_bytes(whole[:size])
        with pytest.raises((ImageError, errors.AufsdError)):
            loading.load(client, str(source))
        assert ids(client) == set()


# --- a root file system, and the command ----------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_root_file_system_is_one_layer(
    client: Client, tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    source = tmp_path / "root.tar"
    source.write_bytes(pack(BASE))
    found = loading.load(client, str(source))
    assert found.layers == [f"sha256-{digest(BASE)[7:]}"]
    assert loading.load(client, str(source)).made == []


def test_the_command_prints_the_layer_and_the_configuration(
    served: Daemon, client: Client, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path / "saved")
    assert run(["--socket", served.socket, "load", source, "--name", "debian"]) == 0
    out, err = capfd.readouterr()
    assert out == "debian\n"
    assert err.count("layer sha256-") == 3
    assert run(["--socket", served.socket, "--json", "load", source]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert (err, found["made"], found["config"]["os"]) == ("", [], "linux")
    assert run(["--socket", served.socket, "load", str(tmp_path)]) == 1
    assert "is no image" in capfd.readouterr().err
    assert run(["--socket", served.socket, "load", str(tmp_path / "nothing")]) == 1
    assert "No such file" in capfd.readouterr().err


def test_a_load_waits_for_no_daemon_whose_sockets_lie_in_its_state_directory(
    tmp_path: Path,
) -> None:
    """As they do by default. A load locks that directory, so that loads go one after another."""
    (tmp_path / "root.tar").write_bytes(BASE)
    with daemon(tmp_path, "--state-dir", str(tmp_path)) as served:
        command = [sys.executable, "-m", "aufsd_client.aufsctl", "--socket", served.socket]
        # a load that hangs is ended
        load = [*command, "load", str(tmp_path / "root.tar")]
        done = subprocess.run(load, capture_output=True, text=True, timeout=60, check=True)
        with served.client() as client:
            assert ids(client) == {done.stdout.split()[-1]}
