"""Layers taken out of a store without a mount: as a tar, and as images for other tools."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from aufsd.__main__ import main
from aufsd.archive.offline import open_offline
from aufsd.archive.requests import Settings
from aufsd_client.cli.__main__ import run
from tests.daemon import Daemon, daemon, eventually
from tests.docker import store
from tests.docker.store import DIFFERENT, LAYERS, ORDERED, View

pytestmark = pytest.mark.root

each_layer = pytest.mark.parametrize("id", ORDERED, ids=store.label)
TOP = max(DIFFERENT, key=lambda id: len(LAYERS[id]["parents"]))
COMPRESSED = min(DIFFERENT, key=lambda id: len(LAYERS[id]["parents"]))
BASE = LAYERS[TOP]["parents"][-1]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store as Docker left it, that nothing ever serves."""
    return store.unpack(tmp_path_factory.mktemp("untouched"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon over another copy, all of it converted for overlayfs."""
    directory = tmp_path_factory.mktemp("served")
    root = store.unpack(directory)
    with daemon(directory, "--adopt", "--backend", "overlay", root=root) as made:
        assert run(["--socket", made.socket, "convert", "--all", "--to", "overlay"]) == 0
        yield made


def unpacked(tar: Path, directory: Path) -> View:
    """What GNU tar makes of an archive."""
    directory.mkdir()
    command = ["tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf"]
    subprocess.run([*command, tar, "-C", directory], check=True)
    return store.seen(str(directory))


def exported(root: Path, id: str, tar: Path) -> Path:
    with open_offline(str(root), Settings()) as found, tar.open("wb") as out:
        assert found.write_view(id, out.fileno()) == []
    return tar


@each_layer
def test_the_tar_of_a_layer_holds_its_whole_view(untouched: Path, tmp_path: Path, id: str) -> None:
    tar = exported(untouched, id, tmp_path / "tar")
    assert unpacked(tar, tmp_path / "tree") == store.expected(id, strict=True)


def test_reading_a_store_leaves_nothing_in_it(untouched: Path, tmp_path: Path) -> None:
    before = store.seen(str(untouched))
    exported(untouched, TOP, tmp_path / "tar")
    assert main(["export", "--root", str(untouched), "--oci", str(tmp_path / "oci"), TOP]) == 0
    assert store.seen(str(untouched)) == before
    assert sorted(os.listdir(untouched)) == ["diff", "layers", "mnt"]


@pytest.mark.service
@each_layer
def test_a_daemon_gives_the_same_tar_of_a_converted_store(
    untouched: Path, served: Daemon, tmp_path: Path, id: str
) -> None:
    online = tmp_path / "online"
    assert run(["--socket", served.socket, "export", id, "-o", str(online)]) == 0
    assert online.read_bytes() == exported(untouched, id, tmp_path / "offline").read_bytes()


@pytest.mark.service
def test_nothing_that_export_makes_stays_in_the_store(served: Daemon, tmp_path: Path) -> None:
    """Interrupted while the daemon waits for room in the pipe."""
    command = [sys.executable, "-m", "aufsd_client.cli.__main__", "--socket", served.socket]
    with subprocess.Popen([*command, "export", TOP], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
    with served.client() as client:
        assert {row.id for row in client.iter_layers()} == LAYERS.keys()


@pytest.mark.service
def test_the_next_export_removes_what_a_killed_one_left(served: Daemon, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aufsd_client.cli.__main__", "--socket", served.socket]
    with subprocess.Popen([*command, "export", TOP], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.read(1)
        child.kill()
    with served.client() as client:
        (left,) = {row.id for row in client.iter_layers()} - LAYERS.keys()
        kept = f"{left[:-1]}x"
        client.create(kept)
        # the daemon reads it until it sees that nobody takes the stream
        export = ["--socket", served.socket, "export", BASE, "-o", f"{tmp_path}/tar"]
        eventually(lambda: run(export) == 0 and not client.exists(left).exists)
        assert {row.id for row in client.iter_layers()} == {*LAYERS, kept}
        assert client.remove(kept).removed


@pytest.mark.service
def test_exports_at_a_time_leave_each_others_layers(served: Daemon, tmp_path: Path) -> None:
    def export(number: int) -> bytes:
        tar = tmp_path / f"{number}"
        assert run(["--socket", served.socket, "export", TOP, "-o", str(tar)]) == 0
        return tar.read_bytes()

    with ThreadPoolExecutor(max_workers=8) as pool:
        assert len(set(pool.map(export, range(24)))) == 1
    with served.client() as client:
        assert {row.id for row in client.iter_layers()} == LAYERS.keys()


@pytest.mark.service
def test_a_store_that_is_served_is_left_to_its_daemon(
    served: Daemon, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--root", str(served.root), TOP]) == 3
    assert "aufsctl" in capfd.readouterr().err


def as_nobody(*command: str) -> subprocess.CompletedProcess[bytes]:
    """Run it as a user who may read all files, and no more."""
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    caps = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
    return subprocess.run([*drop, *caps, *command], capture_output=True, check=False)


def test_who_may_read_the_files_may_export(untouched: Path, tmp_path: Path) -> None:
    found = as_nobody(sys.executable, "-m", "aufsd", "export", "--root", str(untouched), TOP)
    assert found.stderr == b""
    assert found.stdout == exported(untouched, TOP, tmp_path / "tar").read_bytes()


@pytest.mark.service
def test_marks_that_do_not_show_are_no_marks_that_are_not_there(tmp_path: Path) -> None:
    """Read without CAP_SYS_ADMIN, a converted layer would have all its deleted files again."""
    root = store.unpack(tmp_path)
    with daemon(tmp_path, "--adopt", "--backend", "overlay", root=root) as made:
        with made.client() as client, client.mounted(TOP):
            pass
        assert made.stop() == 0
    command = [sys.executable, "-m", "aufsd", "export", "--root", str(root), TOP]
    found = as_nobody(*command)
    assert (found.returncode, found.stdout) == (1, b"")
    assert b"CAP_SYS_ADMIN" in found.stderr
    tar = tmp_path / "tar"
    tar.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    assert unpacked(tar, tmp_path / "tree") == store.expected(TOP, strict=True)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("no-such-layer", 1, "there is no layer no-such-layer"),
        ("../diff", 1, "not a layer id"),
        (f"{TOP} {BASE}", 2, "--oci"),
    ],
)
def test_what_cannot_be_exported_is_a_sentence(
    untouched: Path, capfd: pytest.CaptureFixture[str], words: str, status: int, said: str
) -> None:
    assert main(["export", "--root", str(untouched), *words.split()]) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("lost", ["layers", "diff"])
def test_a_chain_that_is_not_whole_is_not_exported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], lost: str
) -> None:
    root = store.unpack(tmp_path)
    (root / lost / BASE).rename(tmp_path / "lost")
    assert main(["export", "--root", str(root), TOP]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert BASE in err


# --- OCI ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layout(untouched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers of the store as images, and one of them compressed."""
    directory = tmp_path_factory.mktemp("oci") / "layout"
    command = ["export", "--root", str(untouched), "--oci", str(directory)]
    assert main([*command, *ORDERED]) == 0
    assert main([*command, "--gzip", COMPRESSED]) == 0
    return directory


@pytest.mark.oci
@pytest.mark.parametrize(
    "id",
    [id for id in ORDERED if id in DIFFERENT or LAYERS[id]["kind"] == "container-rw"],
    ids=store.label,
)
def test_umoci_unpacks_an_image_to_the_layers_view(layout: Path, tmp_path: Path, id: str) -> None:
    image = ["umoci", "unpack", "--image", f"{layout}:{id}", str(tmp_path / "bundle")]
    subprocess.run(image, check=True, capture_output=True)
    expected = without_empty_xattrs(store.expected(id, strict=True))
    assert store.seen(str(tmp_path / "bundle/rootfs")) == expected


def without_empty_xattrs(view: View) -> View:
    """aufs leaves an empty one where it was removed; to Go's archive/tar that is none (pax(1))."""
    left = {}
    for path, record in view.items():
        kept = {name: value for name, value in record.get("xattrs", {}).items() if value}
        rest = {key: value for key, value in record.items() if key != "xattrs"}
        left[path] = rest | ({"xattrs": kept} if kept else {})
    return left


@pytest.mark.oci
@pytest.mark.parametrize("id", [BASE, COMPRESSED, TOP], ids=store.label)
def test_skopeo_copies_an_image_with_a_layer_for_each_parent(
    layout: Path, tmp_path: Path, id: str
) -> None:
    copy = ["skopeo", "--insecure-policy", "copy", f"oci:{layout}:{id}", f"dir:{tmp_path}/copy"]
    subprocess.run(copy, check=True, capture_output=True)
    manifest = json.loads((tmp_path / "copy/manifest.json").read_bytes())
    assert len(manifest["layers"]) == 1 + len(LAYERS[id]["parents"])
    for layer in manifest["layers"]:
        digest = layer["digest"].removeprefix("sha256:")
        assert (tmp_path / "copy" / digest).read_bytes() == (
            layout / "blobs/sha256" / digest
        ).read_bytes()


def names(layout: Path) -> list[str]:
    index = json.loads((layout / "index.json").read_bytes())
    return [row["annotations"]["org.opencontainers.image.ref.name"] for row in index["manifests"]]


def test_an_image_that_is_exported_again_takes_its_own_place(
    untouched: Path, tmp_path: Path
) -> None:
    layout = tmp_path / "layout"
    for id in (BASE, TOP, BASE):
        assert main(["export", "--root", str(untouched), "--oci", str(layout), id]) == 0
    assert sorted(names(layout)) == sorted([BASE, TOP])
    blobs = os.listdir(layout / "blobs/sha256")
    assert len(blobs) == len(LAYERS[TOP]["parents"]) + 1 + 2 * len([BASE, TOP])


@pytest.mark.parametrize("found", ["file", "index.json"])
def test_only_a_layout_is_added_to(untouched: Path, tmp_path: Path, found: str) -> None:
    (tmp_path / found).write_text("[]")
    assert main(["export", "--root", str(untouched), "--oci", str(tmp_path), BASE]) == 1
    assert os.listdir(tmp_path) == [found]


@pytest.mark.service
def test_a_daemon_gives_the_same_images(
    untouched: Path, served: Daemon, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--root", str(untouched), "--oci", f"{tmp_path}/a", *ORDERED]) == 0
    offline = capfd.readouterr().out
    command = ["--socket", served.socket, "export", "--oci", f"{tmp_path}/b", *ORDERED]
    assert run(command) == 0
    assert capfd.readouterr().out == offline
    assert sorted(os.listdir(tmp_path / "a/blobs/sha256")) == sorted(
        os.listdir(tmp_path / "b/blobs/sha256")
    )


@pytest.mark.service
@pytest.mark.btrfs
@pytest.mark.oci
def test_layers_that_are_snapshots_give_the_images_of_what_they_changed(
    untouched: Path, tmp_path: Path, on_btrfs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A snapshot holds its parents' content too, of which its blob holds nothing."""
    chain = [*reversed(LAYERS[TOP]["parents"]), TOP]
    with daemon(tmp_path, "--backend", "btrfs", root=on_btrfs / "store") as made:
        with made.client() as client, open_offline(str(untouched), Settings()) as docker:
            for id in chain:
                with (tmp_path / "tar").open("wb") as out:
                    docker.write_layer(id, out.fileno())
                client.create(id, parent=(*LAYERS[id]["parents"], "")[0])
                client.apply_diff(id, tmp_path / "tar")
        assert run(["--socket", made.socket, "export", "--oci", f"{tmp_path}/online", TOP]) == 0
        online = capfd.readouterr().out
        assert made.stop() == 0
    command = ["export", "--root", str(made.root), "--oci", f"{tmp_path}/offline", TOP]
    assert main(command) == 0
    assert capfd.readouterr().out == online
    sizes = [layer["size"] for layer in manifest(tmp_path / "offline")["layers"]]
    assert len(sizes) == len(chain)
    # the base has a shell in it, and most others a few files
    assert median(sizes) < sizes[0] // 10
    unpack = ["umoci", "unpack", "--image", f"{tmp_path}/offline:{TOP}", str(tmp_path / "bundle")]
    subprocess.run(unpack, check=True, capture_output=True)
    assert store.seen(str(tmp_path / "bundle/rootfs")) == without_empty_xattrs(
        store.expected(TOP, strict=True)
    )


def manifest(layout: Path) -> dict[str, Any]:
    """The manifest of the one image of a layout."""
    (row,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    path = layout / "blobs" / row["digest"].replace(":", "/")
    return dict(json.loads(path.read_bytes()))
