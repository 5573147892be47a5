"""What is opened as a store, and what is refused with nothing changed."""

import fcntl
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aufsd.kernel import probe, syscalls
from aufsd.store import opening
from aufsd.store.dialect import XattrNamespace
from aufsd.store.index import read_parents
from aufsd.store.layers import Store
from aufsd.store.layout import Layout
from aufsd.store.opening import open_store, refuse_what_is_no_store
from aufsd_client.errors import IncompatibleFilesystem, StoreLocked, StoreNotAdopted

pytestmark = pytest.mark.mounts

NAMESPACE: XattrNamespace = "user" if probe.in_user_namespace() else "trusted"


def opened(root: Path, *, adopt: bool = False) -> Store:
    return open_store(str(root), adopt=adopt, xattr_namespace=NAMESPACE)


def state(top: Path) -> list[tuple[str, int, int, int]]:
    paths = [top, *sorted(top.rglob("*"))]
    return [(str(p), p.lstat().st_mode, p.lstat().st_uid, p.lstat().st_gid) for p in paths]


@pytest.mark.parametrize("adopt", [False, True])
def test_a_directory_that_is_neither_empty_nor_a_store_is_left_as_it_is(
    tmp_path: Path, adopt: bool
) -> None:
    root = tmp_path / "srv"
    (root / "mnt/usb").mkdir(parents=True)
    root.chmod(0o1777)
    (root / "somebodys").touch()
    before = state(root)
    with pytest.raises(StoreNotAdopted, match="neither empty nor a store"):
        opened(root, adopt=adopt)
    assert state(root) == before


def test_the_root_of_the_host_is_never_a_store() -> None:
    with pytest.raises(StoreNotAdopted, match="neither empty nor a store"):
        refuse_what_is_no_store(Layout("/"))


def test_a_new_file_system_is_empty_and_a_start_that_was_cut_off_is_begun_again(
    tmp_path: Path,
) -> None:
    root = tmp_path / "disk"
    (root / "lost+found").mkdir(parents=True)
    opened(root).close()
    (root / ".aufsd/format").unlink()
    opened(root).close()


def linked(root: Path, name: str) -> None:
    (root / name).rename(root.parent / "elsewhere")
    (root / name).symlink_to(root.parent / "elsewhere")


@pytest.mark.parametrize("name", ["layers", "diff", "mnt", ".aufsd", ".aufsd/removing"])
@pytest.mark.parametrize("adopt", [False, True])
def test_no_symlink_of_a_store_is_followed(tmp_path: Path, name: str, adopt: bool) -> None:
    root = tmp_path / "store"
    root.mkdir()
    opened(root).close()
    linked(root, name)
    (tmp_path / "elsewhere/precious").touch()
    before = state(tmp_path)
    with pytest.raises(StoreNotAdopted, match="symlink"):
        opened(root, adopt=adopt)
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", ["diff", "mnt", ".aufsd/removing"])
def test_all_of_a_store_lies_in_one_mount(tmp_path: Path, name: str) -> None:
    """Also where the other mount is of the same file system: rename(2) does not cross it."""
    root = tmp_path / "store"
    root.mkdir()
    opened(root).close()
    syscalls.mount(str(root / name), str(root / name), "", syscalls.MS_BIND)
    try:
        with pytest.raises(IncompatibleFilesystem, match="is a mount"):
            opened(root)
    finally:
        syscalls.umount2(str(root / name))
    opened(root).close()


def owned_by_another(path: Path) -> None:
    os.chown(path, 1000, 1000)


def writable_by_others(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.root
@pytest.mark.parametrize(
    ("name", "plant"),
    [
        (".aufsd", owned_by_another),
        (".aufsd/format", owned_by_another),
        (".aufsd/format", writable_by_others),
        (".aufsd/format", a_fifo),
        (".aufsd/lock", a_fifo),
    ],
)
def test_what_others_planted_says_nothing_of_a_store(
    tmp_path: Path, name: str, plant: Callable[[Path], None]
) -> None:
    root = tmp_path / "store"
    root.mkdir()
    opened(root).close()
    (root / ".aufsd/removing/precious").touch()
    plant(root / name)
    with pytest.raises(StoreNotAdopted, match="not made by aufsd"):
        opened(root)
    assert (root / ".aufsd/removing/precious").exists()


def test_a_parents_file_that_is_none_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    assert read_parents(str(tmp_path / "fifo")) == "its parents file is no file"
    assert "more than" in str(read_parents(str(tmp_path / "huge")))
    with pytest.raises(OSError, match="symbolic links"):
        read_parents(str(tmp_path / "link"))


def id_of(root: Path) -> str:
    store = opened(root)
    store.close()
    return store.format.id


@pytest.mark.parametrize("forged", ["", "../../up", "A" * 32, "é" * 32])
def test_a_store_has_an_id_that_is_a_part_of_a_files_name(tmp_path: Path, forged: str) -> None:
    (tmp_path / "store").mkdir()
    found = id_of(tmp_path / "store")
    assert len(found) == 32
    assert id_of(tmp_path / "store") == found
    (tmp_path / "store/.aufsd/format").write_text(f'{{"format":1,"id":"{forged}"}}')
    found = id_of(tmp_path / "store")
    assert set(found) <= set("0123456789abcdef")
    assert id_of(tmp_path / "store") == found != ""


def test_to_open_a_store_again_takes_no_write(tmp_path: Path) -> None:
    fs = tmp_path / "fs"
    fs.mkdir()
    syscalls.mount("tmpfs", str(fs), "tmpfs", 0, "size=256k,nr_inodes=40")
    try:
        opened(fs).close()
        with (fs / "fill").open("wb", buffering=0) as file, pytest.raises(OSError):  # noqa: PT011, PT012
            while True:
                file.write(b"x" * 4096)
        (fs / "layers/fill").hardlink_to(fs / "fill")
        (fs / "fill").unlink()
        before = (fs / ".aufsd/format").stat().st_mtime_ns, fs.stat().st_ctime_ns
        opened(fs).close()
        assert ((fs / ".aufsd/format").stat().st_mtime_ns, fs.stat().st_ctime_ns) == before
        assert stat.S_IMODE(fs.stat().st_mode) == 0o710
        # of an older aufsd: there is no room to give it an id
        (fs / ".aufsd/format").write_text('{"format":1}')
        assert id_of(fs) == ""
    finally:
        syscalls.umount2(str(fs))


def test_a_store_is_not_opened_while_a_job_of_the_last_daemon_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path).close()
    monkeypatch.setattr(opening, "_JOBS_TRIES", 3)
    with (tmp_path / ".aufsd/jobs").open() as job:
        fcntl.flock(job, fcntl.LOCK_EX)
        with pytest.raises(StoreLocked, match="archive jobs of the last daemon still write"):
            opened(tmp_path)
        released = iter([None, None])

        def pause(_: float) -> None:
            if next(released, job) is job:
                fcntl.flock(job, fcntl.LOCK_UN)

        monkeypatch.setattr(opening, "_JOBS_TRIES", 6000)
        monkeypatch.setattr(time, "sleep", pause)
        opened(tmp_path).close()
