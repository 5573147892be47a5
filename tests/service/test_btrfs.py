"""The daemon over btrfs: layers are snapshots of their parents."""

import errno
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd.archive.relabel import XATTR
from aufsd.kernel import btrfs
from aufsd_client import Client, errors
from tests.archives import tar
from tests.daemon import Daemon, daemon, eventually

pytestmark = [pytest.mark.service, pytest.mark.btrfs]
LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


@pytest.fixture
def served(tmp_path: Path, on_btrfs: Path) -> Iterator[Daemon]:
    """A daemon over a store on btrfs, by `auto`."""
    with daemon(tmp_path, root=on_btrfs / "store") as made:
        yield made


def changes(client: Client, id: str, parent: str = "") -> list[tuple[str | None, str]]:
    return [(change.path, change.kind) for change in client.iter_changes(id, parent=parent)]


def is_subvolume(path: Path) -> bool:
    return btrfs.is_subvolume(path.lstat(), str(path))


def test_auto_takes_btrfs_there_and_says_so(served: Daemon, client: Client) -> None:
    assert client.version().backend == "btrfs"
    assert "the store lies on btrfs" in served.log
    assert client.health().status == "ok"


def test_get_is_the_content_and_nothing_is_mounted(served: Daemon, client: Client) -> None:
    client.create("base")
    client.create("child", parent="base")
    for id in ("base", "child"):
        got = client.get(id)
        assert (got.path, got.mounted) == (str(served.root / "diff" / id), False)
        assert is_subvolume(Path(got.path))
    assert served.mounts() == []
    assert client.get("child").references == 2
    assert client.put("child").references == 1
    assert client.get_metadata("child").metadata["path"] == str(served.root / "diff/child")
    assert client.get_metadata("child").metadata["dialect"] == "none"


def test_a_layer_with_children_is_read_only_until_they_are_gone(client: Client) -> None:
    client.create("base")
    client.create("middle", parent="base")
    client.create("top", parent="middle")
    for id in ("base", "middle"):
        with client.mounted(id) as path, pytest.raises(OSError, match="Read-only file system"):
            Path(path, "new").touch()
        got = client.get(id)
        assert got.read_only
        client.put(id)
    client.remove("top")
    got = client.get("middle")
    assert not got.read_only
    Path(got.path, "new").touch()
    client.put("middle")


def test_what_a_child_changed_is_told_and_moves_in_an_archive(
    client: Client, tmp_path: Path
) -> None:
    client.create("base")
    client.apply_diff("base", tar({f"d/{n}": b"x" * n for n in range(50)}))
    client.create("top", parent="base")
    with client.mounted("top") as path:
        Path(path, "d/1").write_text("changed")
        Path(path, "d/2").unlink()
        os.link(Path(path, "d/3"), Path(path, "linked"))
        Path(path, "d/4").chmod(0o600)
        os.rename(Path(path, "d/5"), Path(path, "d/moved"))
        Path(path, "new/deep").mkdir(parents=True)
        # as much as there was, at the time that it had
        times = Path(path, "d/6").stat()
        Path(path, "d/6").write_bytes(b"y" * 6)
        os.utime(Path(path, "d/6"), ns=(times.st_atime_ns, times.st_mtime_ns))
    expected = [
        ("/d", "modify"),
        ("/d/1", "modify"),
        ("/d/2", "delete"),
        ("/d/4", "modify"),
        ("/d/5", "delete"),
        ("/d/6", "modify"),
        ("/d/moved", "add"),
        ("/linked", "add"),
        ("/new", "add"),
        ("/new/deep", "add"),
    ]
    assert changes(client, "top") == expected
    size = client.diff_size("top").size
    assert size == len("changed") + 4 + 5 + 6 + 3
    client.diff("top", str(tmp_path / "top.tar"))
    client.create("copy", parent="base")
    assert client.apply_diff("copy", str(tmp_path / "top.tar")).size == size
    assert changes(client, "copy") == expected
    assert changes(client, "copy", parent="top") == []


def test_a_second_apply_keeps_what_the_first_one_brought(client: Client) -> None:
    client.create("base")
    client.apply_diff("base", tar({"kept": b"1", "gone": b"2", "d/old": b"3"}))
    client.create("top", parent="base")
    assert client.apply_diff("top", tar({"first": b"x" * 10, ".wh.gone": b""})).size == 10
    assert client.apply_diff("top", tar({"second": b"y" * 5, "d/.wh..wh..opq": b""})).size == 15
    assert changes(client, "top") == [
        ("/d", "modify"),
        ("/d/old", "delete"),
        ("/first", "add"),
        ("/gone", "delete"),
        ("/second", "add"),
    ]
    assert client.diff_size("base").size == 3


def test_a_refused_archive_leaves_the_layer_as_it_was(served: Daemon, client: Client) -> None:
    client.create("base")
    client.apply_diff("base", tar({"kept": b"1"}))
    client.create("top", parent="base")
    with pytest.raises(errors.ArchiveEscape):
        client.apply_diff("top", tar({".wh.kept": b"", "../out": b"x"}))
    assert changes(client, "top") == []
    assert os.listdir(served.root / ".aufsd/staging") == []
    with pytest.raises(errors.LayerHasChildren):
        client.apply_diff("base", tar({"new": b"x"}))


def test_a_base_layer_is_compared_with_nothing(client: Client, tmp_path: Path) -> None:
    client.create("base")
    client.apply_diff("base", tar({"a": b"1", "d/b": b"22"}))
    assert changes(client, "base") == [("/a", "add"), ("/d", "add"), ("/d/b", "add")]
    assert client.diff_size("base").size == 3
    client.diff("base", str(tmp_path / "base.tar"))
    listed = subprocess.run(
        ["tar", "-tf", str(tmp_path / "base.tar")], capture_output=True, text=True, check=True
    )
    assert listed.stdout.splitlines() == ["./", "a", "d/", "d/b"]


def test_remove_takes_subvolumes_inside_along(served: Daemon, client: Client) -> None:
    client.create("base")
    with client.mounted("base") as path:
        for name in ("outer", "outer/d/inner"):
            Path(path, name).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                ["btrfs", "subvolume", "create", f"{path}/{name}"], check=True, capture_output=True
            )
        Path(path, "outer/d/inner/file").touch()
        subprocess.run(["btrfs", "property", "set", f"{path}/outer", "ro", "true"], check=True)
    created = client.create("child", parent="base")
    assert "show as empty" in created.warnings[0]
    assert client.remove("child").removed
    assert client.remove("base").removed
    # they are deleted in the background
    eventually(lambda: not os.listdir(served.root / ".aufsd/removing"))
    for name in ("diff", "mnt", "layers", ".aufsd/staging"):
        assert os.listdir(served.root / name) == []


def test_an_apply_that_would_lose_subvolumes_is_refused(client: Client) -> None:
    client.create("base")
    with client.mounted("base") as path:
        subprocess.run(
            ["btrfs", "subvolume", "create", f"{path}/own"], check=True, capture_output=True
        )
    with pytest.raises(errors.LayerInUse, match="holds subvolumes"):
        client.apply_diff("base", tar({"new": b"x"}))


def test_a_killed_create_or_apply_leaves_nothing(served: Daemon, client: Client) -> None:
    """What lies where at each point of a create: staged; in place without its parents file."""
    client.create("base")
    client.apply_diff("base", tar({"a": b"1"}))
    served.kill()
    for name in (".aufsd/staging/1.1", "diff/half"):
        subprocess.run(
            ["btrfs", "subvolume", "snapshot", str(served.root / "diff/base"), served.root / name],
            check=True,
            capture_output=True,
        )
    (served.root / ".aufsd/staging/layer:half").write_text("base\n")
    (served.root / "mnt/half").mkdir()
    served.start()
    assert '"undone"' in served.log
    with served.client() as again:
        assert again.check().problems == []
        again.create("half", parent="base")
        assert changes(again, "half") == []
    eventually(lambda: not os.listdir(served.root / ".aufsd/removing"))


def test_a_full_quota_is_edquot_and_survives_an_apply(client: Client) -> None:
    client.create("base")
    client.apply_diff("base", tar({"a": b"x" * 100_000}))
    client.create("small", parent="base", storage_opt={"size": "8m"})
    for _ in range(2):
        with client.mounted("small") as path, pytest.raises(OSError, match="quota") as caught:
            fill(Path(path, "fill"), 16 << 20)
        assert caught.value.errno == errno.EDQUOT
        with client.mounted("small") as path:
            Path(path, "fill").unlink()
        client.apply_diff("small", tar({"b": b"y"}))
    # a limit is not inherited
    client.create("grandchild", parent="small")
    with client.mounted("grandchild") as path:
        fill(Path(path, "fill"), 16 << 20)


def fill(path: Path, size: int) -> None:
    """Write that much, to the disk."""
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())


@pytest.mark.parametrize("option", [{"size": "much"}, {"size": "0"}, {"size": ""}, {"inodes": "1"}])
def test_other_storage_options_are_refused(client: Client, option: dict[str, str]) -> None:
    with pytest.raises(errors.InvalidParams):
        client.create("base", storage_opt=option)
    assert not client.exists("base").exists


def test_a_child_of_a_parent_in_use_is_told_what_that_means(client: Client) -> None:
    client.create("base")
    path = Path(client.get("base").path)
    (path / "before").touch()
    created = client.create("top", parent="base")
    assert any("in use" in warning for warning in created.warnings)
    (path / "after").touch()
    assert changes(client, "top") == [("/after", "delete")]
    client.put("base")


def test_layers_of_unions_are_left_to_them_and_snapshots_to_btrfs(
    tmp_path: Path, on_btrfs: Path
) -> None:
    with daemon(tmp_path, "--backend", "overlay", root=on_btrfs / "unions") as served:
        with served.client() as client:
            client.create("base")
        served.stop()
        assert "made for unions" in served.refused("--backend", "btrfs")[1]
        served.flags = ()
        served.start()
        with served.client() as client:
            assert client.version().backend == "overlay"
    (tmp_path / "second").mkdir()
    with daemon(tmp_path / "second", root=on_btrfs / "snapshots") as served:
        with served.client() as client:
            client.create("base")
            with pytest.raises(errors.LayerDamaged, match="no marks to convert"):
                client.convert("base", "aufs")
        served.stop()
        status, said = served.refused("--backend", "overlay")
        assert (status, "only btrfs can serve" in said) == (3, True)


# --- labels ---------------------------------------------------------------------------------------


def label_of(path: str | Path) -> str | None:
    try:
        return os.getxattr(path, XATTR, follow_symlinks=False).rstrip(b"\0").decode()
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return None


def labels(root: str | Path) -> set[str | None]:
    """The labels of all that a layer holds."""
    found = {label_of(root)}
    for directory, names, files in os.walk(root):
        found |= {label_of(f"{directory}/{name}") for name in (*names, *files)}
    return found


@pytest.fixture
def image(client: Client) -> str:
    """A base layer with all kinds of inodes."""
    client.create("image")
    client.apply_diff("image", tar({f"d{n % 7}/e/{n}": b"x" for n in range(700)}))
    with client.mounted("image") as path:
        os.symlink("/etc/passwd", f"{path}/link")
        os.mkfifo(f"{path}/fifo")
        os.mknod(f"{path}/null", 0o020666, os.makedev(1, 3))
    return "image"


def test_a_label_is_put_on_every_inode_of_a_new_layer_and_of_no_other(
    served: Daemon, client: Client, image: str
) -> None:
    client.create("top", parent=image, mount_label=LABEL)
    assert labels(served.root / "diff/top") == {LABEL}
    assert labels(served.root / "diff" / image) == {None}
    assert label_of("/etc/passwd") is None
    # a label is nothing that the layer changed
    assert changes(client, "top") == []
    assert client.diff_size("top").size == 0


def test_only_the_init_layer_is_labelled_where_there_is_one(
    served: Daemon, client: Client, image: str
) -> None:
    """As the seed's change does it for a container of Docker's."""
    client.create("c-init", parent=image, mount_label=LABEL)
    os.setxattr(served.root / "diff/c-init/link", XATTR, b"other", follow_symlinks=False)
    client.create("c", parent="c-init", mount_label=LABEL)
    assert labels(served.root / "diff/c") == {LABEL, "other"}


def relabelled(client: Client) -> int:
    """How many layers were labelled inode by inode."""
    found = re.search(r'aufsd_jobs_total{kind="relabel"} (\d+)', client.metrics().text)
    return int(found[1]) if found else 0


def kept(served: Daemon, id: str) -> list[str]:
    """What is kept with a label of a layer's content."""
    try:
        return os.listdir(served.root / ".aufsd/work" / id)
    except FileNotFoundError:
        return []


def test_what_has_a_label_that_comes_again_is_kept(
    served: Daemon, client: Client, image: str
) -> None:
    for number in range(4):
        client.create(f"top{number}", parent=image, mount_label=LABEL)
        with client.mounted(f"top{number}") as path:
            Path(path, "own").touch()
            Path(path, "d0/e/0").write_text("changed")
        assert changes(client, f"top{number}") == [("/d0/e/0", "modify"), ("/own", "add")]
    assert relabelled(client) == 2, "the first of its label, and the one that was kept"
    assert len(kept(served, image)) == 1
    for number in range(4):
        assert labels(served.root / f"diff/top{number}") - {None} == {LABEL}
        assert label_of(served.root / f"diff/top{number}/d1/e/1") == LABEL
    assert labels(served.root / "diff" / image) == {None}
    # another one takes the place when it has come more often than this was set
    other = LABEL.replace("c1", "c9")
    for number in range(4, 10):
        label = other if number != 5 else LABEL
        client.create(f"top{number}", parent=image, mount_label=label)
        assert labels(served.root / f"diff/top{number}") == {label}
    assert relabelled(client) == 2 + 3
    assert len(kept(served, image)) == 1


def test_labels_that_come_once_keep_nothing(served: Daemon, client: Client, image: str) -> None:
    for number in range(3):
        client.create(f"top{number}", parent=image, mount_label=f"{LABEL}{number}")
    assert kept(served, image) == []


def test_nothing_is_taken_for_what_a_parent_was_before(
    served: Daemon, client: Client, image: str
) -> None:
    for number in range(3):
        client.create(f"top{number}", parent=image, mount_label=LABEL)
        client.remove(f"top{number}")
    assert len(kept(served, image)) == 1
    with client.mounted(image) as path:
        assert kept(served, image) == [], "it can be written to now"
        Path(path, "new").write_text("x")
        client.create("while", parent=image, mount_label=LABEL)
    assert labels(served.root / "diff/while") == {LABEL}
    for number in range(3):
        client.create(f"top{number}", parent=image, mount_label=LABEL)
        assert (served.root / f"diff/top{number}/new").read_text() == "x"
    # behind our back
    content = str(served.root / "diff" / image)
    subprocess.run(["btrfs", "property", "set", content, "ro", "false"], check=True)
    Path(content, "newer").touch()
    client.create("last", parent=image, mount_label=LABEL)
    assert (served.root / "diff/last/newer").exists()
    assert labels(served.root / "diff/last") == {LABEL}


def test_what_is_kept_is_there_after_a_crash(served: Daemon, client: Client, image: str) -> None:
    for number in range(2):
        client.create(f"top{number}", parent=image, mount_label=LABEL)
    served.kill()
    served.start()
    with served.client() as again:
        again.create("last", parent=image, mount_label=LABEL)
        assert relabelled(again) == 0
    assert labels(served.root / "diff/last") == {LABEL}


def test_what_is_kept_goes_with_its_layer_and_with_its_content(
    served: Daemon, client: Client, image: str
) -> None:
    def fill() -> None:
        for number in range(3):
            client.create(f"top{number}", parent=image, mount_label=LABEL, storage_opt=size)
            client.remove(f"top{number}")

    size = {"size": "1G"}
    fill()
    assert kept(served, image) == [], "a limit would be kept with it"
    size = {}
    fill()
    assert len(kept(served, image)) == 1
    client.apply_diff(image, tar({"f": b"other"}))
    assert kept(served, image) == []
    fill()
    assert len(kept(served, image)) == 1
    client.remove(image)
    assert os.listdir(served.root / ".aufsd/work") == []
    eventually(lambda: os.listdir(served.root / ".aufsd/removing") == [])


@pytest.mark.parametrize("label", ["", "label:disable"])
def test_one_layer_goes_without(served: Daemon, client: Client, image: str, label: str) -> None:
    assert client.create("top", parent=image, mount_label=label).warnings == []
    assert labels(served.root / "diff/top") == {None}


def test_the_daemon_goes_without(served: Daemon, client: Client, image: str) -> None:
    served.stop()
    served.start("--no-selinux")
    with served.client() as again:
        created = again.create("top", parent=image, mount_label=LABEL)
        assert created.warnings == ["labels are off for this daemon (selinux = false)"]
        assert labels(served.root / "diff/top") == {None}


def test_a_create_whose_label_cannot_be_set_leaves_nothing(
    served: Daemon, client: Client, image: str
) -> None:
    """No xattr of btrfs is longer than a block; the daemon's own check of labels is shorter."""
    with pytest.raises(errors.InvalidLabel):
        client.create("top", parent=image, mount_label="x" * 300)
    assert not client.exists("top").exists
    assert os.listdir(served.root / ".aufsd/staging") == []
