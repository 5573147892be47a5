"""The store on a real disk: create, remove, swap, recover, adopt, refuse."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aufsd.kernel import probe, syscalls
from aufsd.store import creation, recovery, removal, staging
from aufsd.store.dialect import XattrNamespace
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.store.opening import open_store
from aufsd_client.errors import (
    LayerDamaged,
    LayerExists,
    NoSpace,
    StoreLocked,
    StoreNotAdopted,
)

pytestmark = pytest.mark.mounts  # for the owners and trusted xattrs that only root may set

A, B, C = LayerId("a"), LayerId("b"), LayerId("c")


@contextmanager
def opened(root: Path, *, adopt: bool = False) -> Iterator[Store]:
    root.mkdir(exist_ok=True)
    store = open_store(str(root), adopt=adopt, xattr_namespace=NAMESPACE)
    try:
        yield store
    finally:
        store.close()


NAMESPACE: XattrNamespace = "user" if probe.in_user_namespace() else "trusted"


def make(store: Store, id: LayerId, *parents: LayerId) -> None:
    store.register(id, parents[0] if parents else None)
    creation.create_on_disk(store, id, parents, {})


def names(root: Path) -> dict[str, list[str]]:
    return {sub: sorted(os.listdir(root / sub)) for sub in ("layers", "diff", "mnt")}


def tree(root: Path) -> list[tuple[str, int, int, bytes]]:
    found = []
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found.append((str(path), info.st_mode, info.st_ino, content))
    return found


def test_a_created_layer_is_laid_out_as_dockers_driver_lays_it_out(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        make(store, A)
        make(store, B, A)
        make(store, C, B, A)
        assert names(tmp_path / "s") == {sub: ["a", "b", "c"] for sub in ("layers", "diff", "mnt")}
        assert (tmp_path / "s/layers/a").read_text() == ""
        assert (tmp_path / "s/layers/c").read_text() == "b\na\n"
        assert store.chain(C) == (C, B, A)
        assert store.children_of(A) == {B}
    with opened(tmp_path / "s") as store:
        assert store.chain(C) == (C, B, A)
        assert store.children_of(B) == {C}


def test_modes_are_applied_again_at_each_start(tmp_path: Path) -> None:
    root = tmp_path / "s"
    with opened(root):
        pass
    for sub in ("", "layers", "diff", "mnt"):
        (root / sub).chmod(0o755)
    with opened(root):
        for sub in ("", "layers", "diff", "mnt"):
            assert stat.S_IMODE((root / sub).stat().st_mode) == 0o710


def test_the_top_directory_carries_what_the_parents_has(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        make(store, A)
        top = tmp_path / "s/diff/a"
        top.chmod(0o1751)
        os.setxattr(top, "user.kept", b"x")
        os.utime(top, ns=(10**18, 10**18 + 1))
        make(store, B, A)
        child = tmp_path / "s/diff/b"
        assert stat.S_IMODE(child.stat().st_mode) == 0o1751
        assert os.getxattr(child, "user.kept") == b"x"
        assert child.stat().st_mtime_ns == 10**18 + 1


def test_a_taken_id_changes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        make(store, A)
        make(store, B, A)
        before = tree(tmp_path / "s")
        with pytest.raises(LayerExists):
            store.register(B, None)
        with pytest.raises(LayerExists):
            creation.create_on_disk(store, B, (), {})
        assert tree(tmp_path / "s") == before


def test_a_create_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        before = names(tmp_path / "s")
        with pytest.raises(OSError, match=r"not permitted|not supported"):
            creation.create_on_disk(store, A, (), {"nonsense.xattr": b""})
        assert names(tmp_path / "s") == before
        assert os.listdir(store.layout.staging) == []


def test_content_that_belongs_to_no_layer_is_never_taken_over(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        (tmp_path / "s/diff/a").mkdir()
        (tmp_path / "s/diff/a/precious").write_text("x")
        with pytest.raises(LayerExists, match="not empty"):
            creation.create_on_disk(store, A, (), {})
        assert (tmp_path / "s/diff/a/precious").read_text() == "x"


def test_a_removed_layer_is_gone_from_all_three_and_then_from_the_disk(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        make(store, A)
        (tmp_path / "s/diff/a/deep/er").mkdir(parents=True)
        assert removal.remove_on_disk(store, A) == []
        store.forget(A)
        assert names(tmp_path / "s") == {"layers": [], "diff": [], "mnt": []}
        assert removal.erase_removed(store) == {}
        assert os.listdir(store.layout.removing) == []


def test_nothing_is_deleted_through_a_mount(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        make(store, A)
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "file").write_text("x")
        inside = tmp_path / "s/diff/a/inside"
        inside.mkdir()
        syscalls.mount("tmpfs", str(inside), "tmpfs", 0, "size=64k")
        (inside / "file").write_text("x")
        removal.remove_on_disk(store, A)
        store.forget(A)
        (left,) = removal.erase_removed(store).values()
        moved = next(Path(store.layout.removing).glob("*/inside"))
        assert (left.path, left.errno) == (str(moved), errno.EXDEV)
        assert (moved / "file").read_text() == "x"
        syscalls.umount2(str(moved))
        assert removal.erase_removed(store) == {}


def test_swapped_in_content_takes_the_place_in_one_step(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        make(store, A)
        (tmp_path / "s/diff/a/old").write_text("x")
        staged = Path(staging.stage(store, A, {}))
        (staged / "new").write_text("y")
        staging.swap_in(store, A, str(staged))
        assert os.listdir(tmp_path / "s/diff/a") == ["new"]
        assert not staged.exists()


def test_a_second_daemon_is_told_who_is_first(tmp_path: Path) -> None:
    with opened(tmp_path / "s"):
        with pytest.raises(StoreLocked) as caught:
            open_store(str(tmp_path / "s"), adopt=False)
        assert caught.value.code == 502
    with opened(tmp_path / "s"):
        pass


def docker_store(root: Path) -> None:
    for sub in ("layers", "diff", "mnt"):
        for id in ("base", "top"):
            (root / sub).mkdir(parents=True, exist_ok=True)
            if sub != "layers":
                (root / sub / id).mkdir()
    (root / "layers/base").write_text("")
    (root / "layers/top").write_text("base\n")
    (root / "diff/top/.wh.gone").write_text("")


def test_a_store_that_docker_made_is_served_only_when_adopted(tmp_path: Path) -> None:
    root = tmp_path / "s"
    docker_store(root)
    before = tree(root)
    with pytest.raises(StoreNotAdopted) as caught, opened(root):
        pass
    assert caught.value.code == 501
    assert tree(root) == before
    with opened(root, adopt=True) as store:
        assert store.chain(LayerId("top")) == ("top", "base")
    kept = [row for row in tree(root) if "/.aufsd" not in row[0]]
    assert [row[3] for row in kept] == [row[3] for row in before]
    with opened(root) as store:  # once is enough
        assert store.format.adopted


def test_a_store_of_a_newer_aufsd_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    root = tmp_path / "s"
    with opened(root) as store:
        make(store, A)
    (root / ".aufsd/format").write_text('{"format": 9, "backend": "overlay"}')
    before = tree(root)
    with pytest.raises(StoreNotAdopted, match="newer aufsd"), opened(root):
        pass
    assert tree(root) == before


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("top", "nosuch\n", "does not exist"),
        ("top", "base\nbase\n", "does not continue"),
        ("base", "top\nbase\n", "circle"),
        ("top", "../base\n", "not a layer id"),
        ("top", "b\xff\n", "not text"),
    ],
)
def test_a_damaged_chain_is_in_quarantine_and_the_rest_is_served(
    tmp_path: Path, name: str, text: str, problem: str
) -> None:
    root = tmp_path / "s"
    docker_store(root)
    (root / "layers/other").write_text("")
    (root / "diff/other").mkdir()
    (root / "layers" / name).write_bytes(text.encode("latin-1"))
    with opened(root, adopt=True) as store:
        assert store.chain(LayerId("other")) == ("other",)
        with pytest.raises(LayerDamaged) as caught:
            store.chain(LayerId("top"))
        assert any(problem in why for why in store.damaged.values()), store.damaged
        assert caught.value.code == 106


def interrupted_create(store: Store) -> None:
    os.mkdir(store.layout.content(A))
    Path(store.layout.content(A), "snapshot").write_text("x")
    os.mkdir(store.layout.mount_point(A))
    Path(store.layout.creation(A)).write_text("")


def interrupted_remove(store: Store) -> None:
    make(store, A)
    Path(store.layout.content(A), "file").write_text("x")
    os.rename(store.layout.parents_file(A), store.layout.removal(A))


def interrupted_apply(store: Store) -> None:
    staged = Path(store.layout.staging, "1.1")
    staged.mkdir()
    (staged / "half").write_text("x")


def interrupted_docker_remove(store: Store) -> None:
    for directory in (store.layout.diff, store.layout.mnt):
        os.mkdir(f"{directory}/123-removing")
    Path(store.layout.diff, "123-removing/file").write_text("x")


@pytest.mark.parametrize(
    "leave",
    [interrupted_create, interrupted_remove, interrupted_apply, interrupted_docker_remove],
)
def test_recovery_leaves_each_layer_wholly_there_or_wholly_gone(
    tmp_path: Path, leave: Callable[[Store], None]
) -> None:
    root = tmp_path / "s"
    with opened(root) as store:
        make(store, B)
        Path(store.layout.content(B), "kept").write_text("x")
        leave(store)
    with opened(root) as store:
        assert recovery.recover(store)
        assert names(root) == {"layers": ["b"], "diff": ["b"], "mnt": ["b"]}
        assert (root / "diff/b/kept").exists()
        assert os.listdir(store.layout.staging) == []
        assert recovery.recover(store) == []
        removal.erase_removed(store)
        assert os.listdir(store.layout.removing) == []


def test_recovery_leaves_alone_what_aufsd_did_not_make(tmp_path: Path) -> None:
    root = tmp_path / "s"
    docker_store(root)
    (root / "diff/orphan").mkdir()
    (root / "diff/orphan/file").write_text("x")
    with opened(root, adopt=True) as store:
        assert recovery.recover(store) == []
    assert (root / "diff/orphan/file").read_text() == "x"


def test_a_full_disk_is_said_with_its_code(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    syscalls.mount("tmpfs", str(small), "tmpfs", 0, "size=1m,nr_inodes=20")
    try:
        with opened(small) as store:
            before = names(small)
            ids = (LayerId(f"l{number}") for number in range(20))
            with pytest.raises(NoSpace):  # noqa: PT012  # which of them is the one that fails
                for id in ids:
                    before = names(small)
                    make(store, id)
            assert names(small) == before
    finally:
        syscalls.umount2(str(small))
