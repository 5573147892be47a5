"""Docker's own driver over layers that aufsd wrote, and aufsd over what Docker adds to them."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from aufsd.archive.offline import open_offline
from aufsd.archive.requests import Settings
from aufsd_client import Client
from tests.archives import tar
from tests.daemon import daemon
from tests.docker import store
from tests.docker.dockerd import Dockerd, dockerd, record
from tests.docker.store import DIFFERENT, LAYERS, View

pytestmark = [pytest.mark.aufs, pytest.mark.service, pytest.mark.dockerd]

# what Docker lays over the image in every container
OF_DOCKER = (".", ".dockerenv", "dev", "etc", "proc", "sys")
# the longest chain of an image that is read in one way
TOP = max(
    (id for id in LAYERS if LAYERS[id]["kind"] == "image" and id not in DIFFERENT),
    key=lambda id: len(LAYERS[id]["parents"]),
)


def write_layers(client: Client, directory: Path) -> list[tuple[str, str]]:
    """Layers of every kind, unpacked from archives, and one written through a mounted union."""
    ids: list[str] = []
    source = store.unpack(directory)
    with open_offline(str(source), Settings()) as docker:
        for id in reversed([TOP, *LAYERS[TOP]["parents"]]):
            archive = directory / "tar"
            with archive.open("wb") as out:
                docker.write_layer(id, out.fileno())
            ids.append(_create(client, ids))
            client.apply_diff(ids[-1], archive)
    ids.append(_create(client, ids))
    with client.mounted(ids[-1]) as path:
        _change(Path(path))
    return [(id, str(client.diff(id, bytearray(), digest=True).digest)) for id in ids]


def _create(client: Client, ids: list[str]) -> str:
    id = f"{len(ids):064x}"
    client.create(id, parent=ids[-1] if ids else "")
    return id


def _change(root: Path) -> None:
    """What has marks on disk: a deleted file, a directory made anew, a hard link written to."""
    (root / "srv/alpha/one.txt").unlink()
    shutil.rmtree(root / "srv/beta/sub", ignore_errors=True)
    (root / "srv/beta/sub").mkdir()
    (root / "srv/beta/sub/new").write_text("new")
    with (root / "srv/hl/a").open("a") as file:
        file.write("more")


def exported(docker: Dockerd, container: str, directory: Path) -> View:
    """What Docker shows of a container."""
    docker("export", "-o", str(directory / "export"), container)
    tree = directory / "tree"
    tree.mkdir()
    command = ["tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf"]
    subprocess.run([*command, directory / "export", "-C", tree], check=True)
    return of_the_image(store.seen(str(tree)))


def of_the_image(view: View) -> View:
    """Without Docker's own, and without the xattrs that it exports none of."""
    return {
        path: {key: value for key, value in record.items() if key != "xattrs"} | _capability(record)
        for path, record in view.items()
        if path.split("/")[0] not in OF_DOCKER
    }


def _capability(record: dict[str, object]) -> dict[str, object]:
    xattrs = record.get("xattrs")
    assert isinstance(xattrs, dict | None)
    found = (xattrs or {}).get("security.capability")
    return {"xattrs": {"security.capability": found}} if found else {}


def test_docker_reads_what_aufsd_wrote_and_aufsd_what_docker_adds(tmp_path: Path) -> None:
    data = tmp_path / "docker"
    data.mkdir()
    with daemon(tmp_path, "--backend", "aufs", root=data / "aufs") as served:
        with served.client() as client:
            layers = write_layers(client, tmp_path)
            image = record(data, layers)
            with client.mounted(layers[-1][0]) as path:
                written = of_the_image(store.seen(path))
        assert served.stop() == 0
        with tempfile.TemporaryDirectory() as run, dockerd(data, Path(run)) as docker:
            container = docker("create", image, "/none")
            assert exported(docker, container, tmp_path) == written
            subprocess.run(
                ["docker", "-H", docker.address, "cp", "-", f"{container}:/"],
                input=tar({"added": b"added"}),
                check=True,
            )
            docker("commit", container, "second")
            layer = docker.layer_of(container)
        served.start()
        with served.client() as client:
            assert {id for id, _ in layers} < {row.id for row in client.iter_layers()}
            assert client.check(deep=True).problems == []
            with client.mounted(layer) as path:
                found = of_the_image(store.seen(path))
            assert found.pop("added")["size"] == 5
            assert found == written
