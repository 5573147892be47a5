"""Docker's own tests of its AUFS driver (moby daemon/graphdriver/aufs/aufs_test.go), by socket.

Each says the same of a layer store, whatever union file system is under it. What Docker's driver
got wrong (docker-aufs.md, defects B1 to B16) is tested beside what it got right.
"""

import hashlib
import os
from pathlib import Path

import pytest

from aufsd_client import Client, errors
from tests.archives import tar
from tests.daemon import Daemon

pytestmark = pytest.mark.service


def rows(client: Client) -> list[tuple[str | None, str]]:
    return [(change.path, change.kind) for change in client.iter_changes("2")]


def write(client: Client, id: str, name: str, content: str | bytes) -> None:
    """Change a layer the way a container does: through its path, between get and put."""
    with client.mounted(id) as path:
        data = content if isinstance(content, bytes) else content.encode()
        Path(path, name).write_bytes(data)


def test_create_makes_a_directory_of_each_kind(served: Daemon, client: Client) -> None:
    client.create("1")
    for sub in ("mnt", "diff"):
        assert (served.root / sub / "1").is_dir()
    assert (served.root / "layers/1").read_text() == ""


def test_a_daemon_starts_on_what_it_left(served: Daemon, client: Client) -> None:
    client.create("1")
    client.create("2", parent="1")
    assert served.stop() == 0
    served.start()
    with served.client() as again:
        assert [row.id for row in again.iter_layers()] == ["1", "2"]


def test_remove_leaves_nothing_of_the_layer(served: Daemon, client: Client) -> None:
    client.create("1")
    assert client.remove("1").removed
    for sub in ("mnt", "diff", "layers"):
        assert os.listdir(served.root / sub) == []


def test_a_base_layers_directory_goes_too_after_it_was_got(served: Daemon, client: Client) -> None:
    """B4: moby removed the content twice and leaked mnt/<id> for ever."""
    client.create("1")
    client.get("1")
    client.put("1")
    assert client.remove("1").removed
    assert os.listdir(served.root / "mnt") == []


def test_get_without_a_parent_is_the_content_directory(served: Daemon, client: Client) -> None:
    client.create("1")
    got = client.get("1")
    assert got.path == str(served.root / "diff/1")
    assert (got.mounted, got.read_only, got.references) == (False, False, 1)
    assert served.mounts() == []


def test_a_put_too_many_does_not_turn_a_base_layer_into_its_mount_point(
    served: Daemon, client: Client
) -> None:
    """B3: moby cached mnt/<id> for it, and the next Get returned that empty directory."""
    client.create("1")
    client.put("1")
    assert client.get("1").path == str(served.root / "diff/1")


def test_cleanup_of_nothing_and_of_something(served: Daemon, client: Client) -> None:
    assert client.cleanup().unmounted == []
    client.create("1")
    client.create("2", parent="1")
    client.get("2")
    client.get("2")
    assert client.cleanup().unmounted == ["2"]
    assert served.mounts() == []


def test_a_layer_with_a_parent_is_mounted_at_mnt(served: Daemon, client: Client) -> None:
    client.create("1")
    client.create("2", parent="1")
    assert client.get("2").path == str(served.root / "mnt/2")
    assert served.mounts() == ["2"]


def test_remove_of_a_mounted_layer_without_put(served: Daemon, client: Client) -> None:
    """B8: the seed returned as if it had removed it, moby removed it under its users."""
    client.create("1")
    client.create("2", parent="1")
    client.get("2")
    with pytest.raises(errors.LayerInUse, match="it has 1 reference"):
        client.remove("2")
    refused = client.remove("2", in_use_ok=True)
    assert (refused.removed, refused.reason, refused.references) == (False, "in-use", 1)
    assert served.mounts() == ["2"]
    assert client.remove("2", force=True).removed
    assert served.mounts() == []
    assert client.remove("2").reason == "not-found"


def test_create_on_a_parent_that_does_not_exist_leaves_nothing(
    served: Daemon, client: Client
) -> None:
    """B6: moby left both directories and an empty parents file, so that the layer existed."""
    with pytest.raises(errors.ParentNotFound):
        client.create("1", parent="docker")
    assert not client.exists("1").exists
    for sub in ("mnt", "diff", "layers"):
        assert os.listdir(served.root / sub) == []


def test_create_of_an_id_that_exists_changes_nothing(served: Daemon, client: Client) -> None:
    """B5: moby truncated the parents file, and the layer lost its parents."""
    client.create("1")
    client.create("2", parent="1")
    for parent in ("", "1"):
        with pytest.raises(errors.LayerExists):
            client.create("2", parent=parent)
    assert (served.root / "layers/2").read_text() == "1\n"


def test_get_of_an_unknown_layer_is_an_error(client: Client) -> None:
    """B2: moby returned diff/<id> and no error."""
    with pytest.raises(errors.LayerNotFound):
        client.get("nosuch")


def test_remove_of_a_parent_is_refused(client: Client) -> None:
    """B14: moby removed it, and its children lost their branches."""
    client.create("1")
    client.create("2", parent="1")
    for force in (False, True):
        with pytest.raises(errors.LayerHasChildren) as caught:
            client.remove("1", force=force)
        assert caught.value.data["children"] == ["2"]


def test_a_layer_with_children_cannot_be_written(client: Client) -> None:
    """B16: moby mounted image layers read-write, and every child saw the change."""
    client.create("1")
    client.create("2", parent="1")
    client.create("3", parent="2")
    got = client.get("2")
    assert got.read_only
    with pytest.raises(OSError, match="Read-only file system"):
        Path(got.path, "new").touch()


@pytest.mark.parametrize("id", ["", ".", "..", "a/b", "../x", "a\nb", "x-removing", "a" * 300])
def test_an_id_that_is_none_reaches_no_path(served: Daemon, client: Client, id: str) -> None:
    """B7: moby joined it to its paths; Remove("") tried mnt itself."""
    for call in (client.create, client.get, client.put, client.remove, client.exists):
        with pytest.raises(errors.InvalidLayerId):
            call(id)


def test_changes_of_a_layer_and_of_its_child(client: Client) -> None:
    client.create("1")
    client.create("2", parent="1")
    write(client, "2", "test.txt", "hello")
    assert rows(client) == [("/test.txt", "add")]
    client.create("3", parent="2")
    write(client, "3", "test2.txt", "hello")
    third = [(change.path, change.kind) for change in client.iter_changes("3")]
    assert third == [("/test2.txt", "add")]


def test_diff_size_counts_a_layers_own_bytes(client: Client) -> None:
    client.create("1")
    with client.mounted("1") as path, open(f"{path}/test_file", "wb") as file:
        file.truncate(1024)
    assert client.diff_size("1").size == 1024
    client.create("2", parent="1")
    assert client.diff_size("2").size == 0


def test_exists(client: Client) -> None:
    client.create("1")
    assert not client.exists("none").exists
    assert client.exists("1").exists


def test_status_begins_with_dockers_four_rows(served: Daemon, client: Client) -> None:
    client.create("1")
    status = client.status()
    first = [tuple(row) for row in status.status[:4]]
    assert [name for name, _ in first] == [
        "Root Dir",
        "Backing Filesystem",
        "Dirs",
        "Dirperm1 Supported",
    ]
    assert first[0][1] == str(served.root)
    assert first[2][1] == "1"


def test_a_diff_applied_to_a_sibling_shows_through_its_mount(
    client: Client, tmp_path: Path
) -> None:
    client.create("1")
    with client.mounted("1") as path, open(f"{path}/test_file", "wb") as file:
        file.truncate(1024)
    stream = tmp_path / "1.tar"
    client.diff("1", str(stream))
    client.create("2")
    client.create("3", parent="2")
    client.apply_diff("3", str(stream))
    with client.mounted("3") as path:
        assert Path(path, "test_file").stat().st_size == 1024


def test_a_hard_link_survives_diff_and_apply(client: Client, tmp_path: Path) -> None:
    client.create("1")
    write(client, "1", "file", "content")
    client.create("2", parent="1")
    with client.mounted("2") as path:
        Path(path, "new").write_text("new")
        os.link(Path(path, "new"), Path(path, "linked"))
    stream = tmp_path / "2.tar"
    client.diff("2", str(stream))
    client.create("3", parent="1")
    client.apply_diff("3", str(stream))
    with client.mounted("3") as path:
        assert os.path.samefile(f"{path}/new", f"{path}/linked")
        assert Path(path, "linked").read_text() == "new"


def long_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_more_than_42_layers(client: Client) -> None:
    """moby 6d97339ca2: the options of 42 layers filled the page, and the rest was cut silently.

    126 layers with 64-character ids, each with a file of its own; every tenth deletes its parent's.
    """
    last, expected = "", 0
    for number in range(1, 127):
        current = long_id(f"layer{number}")
        client.create(current, parent=last)
        entries: dict[str, bytes | str | None] = {current: b"content"}
        if last and number % 10 == 0:
            entries[f".wh.{last}"] = b""
            expected -= 1
        expected += 1
        client.apply_diff(current, tar(entries))
        last = current
    with client.mounted(last) as path:
        assert len(os.listdir(path)) == expected


def test_a_chain_is_as_long_as_the_kernel_takes_and_no_longer(
    served: Daemon, client: Client
) -> None:
    """Told when a layer is made; Docker's driver found out at the mount."""
    limit = int(dict(client.status().status)["Maximum Branches"])
    client.create("0")
    client.apply_diff("0", tar({"bottom": b"content"}))
    for number in range(1, limit):
        client.create(f"{number}", parent=f"{number - 1}")
    top = f"{limit - 1}"
    with pytest.raises(errors.TooManyLayers, match=f"takes {limit} here") as caught:
        client.create("one-more", parent=top)
    assert caught.value.data["limit"] == limit
    assert not client.exists("one-more").exists
    for sub in ("mnt", "diff", "layers"):
        assert len(os.listdir(served.root / sub)) == limit
    with client.mounted(top) as path:
        assert Path(path, "bottom").read_text() == "content"
        Path(path, "new").touch()
    assert (served.root / "diff" / top / "new").exists()


def test_a_label_is_checked_before_it_reaches_the_options(client: Client) -> None:
    client.create("1")
    client.create("2", parent="1")
    for label in ('a"b', "a\nb", "x" * 256, "a\\b"):
        with pytest.raises(errors.InvalidLabel):
            client.get("2", mount_label=label)
    assert client.mounts().mounts == []


def test_the_top_directory_of_the_image_shows_in_every_child(
    served: Daemon, client: Client
) -> None:
    """B13: moby showed `/` as 0755 root, whatever the image had."""
    import tarfile

    top = tarfile.TarInfo("./")
    top.type, top.mode, top.uid, top.gid, top.mtime = tarfile.DIRTYPE, 0o1711, 5, 6, 1_400_000_000
    client.create("1")
    client.apply_diff("1", tar({"./": top, "f": b"x"}))
    client.create("2", parent="1")
    with client.mounted("2") as path:
        found = os.stat(path)
        assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o1711, 5, 6)
        assert int(found.st_mtime) == 1_400_000_000
