"""Several layers become one: it shows the same, whatever they were."""

import errno
import os
import random
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from aufsd_client import Client, errors
from tests.archives import tar
from tests.backends import on_unions
from tests.daemon import Daemon, eventually
from tests.service.test_checkpoint import shown

pytestmark = pytest.mark.service


@pytest.fixture
def served(each_backend: Daemon) -> Daemon:
    """A daemon of each backend, with `top` on `base`."""
    with each_backend.client() as client:
        client.create("base")
        files = {f"{d}/{f}": f"{d}{f}".encode() for d in "abc" for f in "xyz"}
        client.apply_diff("base", tar({"a": None, "b": None, "c": None, **files, "f": b"f"}))
        client.create("top", parent="base")
    return each_backend


def scramble(top: Path, chosen: random.Random) -> None:
    """Change some of what a union shows, by every way that leaves a mark in its branch."""
    for _ in range(12):
        directories = [path for path in top.rglob("*") if path.is_dir() and not path.is_symlink()]
        at = chosen.choice([top, *directories])
        try:
            _change(at / chosen.choice("abcxyz"), chosen)
        except OSError as error:
            # fuse-overlayfs cannot link some files, nor make some directories where one was
            if error.errno not in (errno.EIO, errno.EEXIST):
                raise
    for path in (top, *top.rglob("*")):
        # pages of a FUSE mount may be written, and set a time, when it is unmounted
        # which that refuses for some files that took the place of a directory
        with suppress(OSError):
            os.utime(path, ns=(0, path.lstat().st_mtime_ns), follow_symlinks=False)


def _change(path: Path, chosen: random.Random) -> None:
    plain = path.is_file() and not path.is_symlink()
    match chosen.randrange(8):
        case 0 | 1:
            _remove(path)
            path.write_bytes(chosen.randbytes(5))
        case 2:
            _remove(path)
        case 3:
            _remove(path)
            path.mkdir(mode=chosen.choice((0o700, 0o755)))
        case 4 if plain:
            other = path.with_name(path.name + "-link")
            _remove(other)
            os.link(path, other)
        case 5:
            _remove(path)
            path.symlink_to("nowhere")
        case 6 if plain or path.is_dir():
            os.setxattr(path, "user.note", chosen.randbytes(3))
            os.chmod(path, 0o750)
        case 7:
            _remove(path)
            os.mkfifo(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for below in list(path.iterdir()):
            _remove(below)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def whole(client: Client, id: str) -> dict[str, tuple[object, ...]]:
    """All that a layer shows, to the attribute; which names are one file too."""
    with client.mounted(id) as path:
        first: dict[int, str] = {}
        found: dict[str, tuple[object, ...]] = {}
        for each in sorted((Path(path), *Path(path).rglob("*"))):
            info, name = each.lstat(), str(each.relative_to(path))
            body: object = info.st_rdev
            if stat.S_ISREG(info.st_mode):
                body = each.read_bytes()
            elif stat.S_ISLNK(info.st_mode):
                body = os.readlink(each)
            xattrs = {
                one: os.getxattr(each, one, follow_symlinks=False)
                for one in os.listxattr(each, follow_symlinks=False)
                if one.startswith("user.")
            }
            same = "" if each.is_dir() else first.setdefault(info.st_ino, name)
            found[name] = (
                *(info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns),
                *(body, xattrs, same),
            )
        return found


@pytest.mark.parametrize("onto", ["base", "n1", ""])
@pytest.mark.parametrize("seed", range(3))
def test_a_squashed_layer_shows_the_same(
    seed: int, onto: str, served: Daemon, client: Client
) -> None:
    chosen = random.Random(f"{seed} {onto}")
    for number in range(4):
        with client.mounted("top") as path:
            scramble(Path(path), chosen)
        client.checkpoint("top", f"n{number}")
    with client.mounted("top") as path:
        scramble(Path(path), chosen)
    before, below = whole(client, "top"), whole(client, onto) if onto else {}
    done = client.squash("top", onto)
    gone = {"base": ["n3", "n2", "n1", "n0"], "n1": ["n3", "n2"]}
    assert (done.removed, done.kept) == (gone.get(onto, [*gone["base"], "base"]), [])
    assert whole(client, "top") == before
    assert client.get_metadata("top").metadata["parents"].split(" ")[0] == onto
    if onto:
        assert whole(client, onto) == below
    changed = {each.path: each.kind for each in client.iter_changes("top")}
    for key in {*before, *below} - {"."}:
        name = f"/{key}"
        if changed.get(name) is None:
            # what is not told of did not change; the last of it is another name of the file
            if key in before and key in below:
                assert before[key][:-1] == below[key][:-1], name
        elif changed[name] == "add":
            assert key not in below, name
        elif changed[name] == "delete":
            assert key in below, name
            assert key not in before, name
    assert client.check(deep=True).problems == []
    removing = served.root / ".aufsd/removing"
    eventually(lambda: not os.listdir(removing))
    assert whole(client, "top") == before


@on_unions
def test_what_others_need_stays_and_never_changes(served: Daemon, client: Client) -> None:
    for number in range(4):
        with client.mounted("top") as path:
            Path(path, f"f{number}").write_text(str(number))
            os.link(Path(path, f"f{number}"), Path(path, f"l{number}"))
            Path(path, f"s{number}").symlink_to("f")
            Path(path, "a/x").unlink(missing_ok=True)
        client.checkpoint("top", f"n{number}")
    client.create("other", parent="n1")
    client.get("n2")
    before, other = whole(client, "top"), whole(client, "other")
    done = client.squash("top", "base")
    # n2 is referenced, so what it stands on stays as well
    assert (done.removed, done.kept) == (["n3"], ["n2", "n1", "n0"])
    assert whole(client, "top") == before
    with client.mounted("top") as path:
        for name in ("f0", "f1"):
            Path(path, name).write_text("changed")
        os.chmod(Path(path, "l1"), 0o600)
        os.lchown(Path(path, "s1"), 5, 5)
        assert Path(path, "l1").read_text() == "changed"
    assert whole(client, "other") == other
    assert client.check(deep=True).problems == []


@on_unions
def test_files_are_links_and_not_copies(served: Daemon, client: Client) -> None:
    with client.mounted("top") as path:
        Path(path, "big").write_bytes(b"b" * 1_000_000)
    inode = (served.root / "diff/top/big").stat().st_ino
    client.checkpoint("top", "n0")
    client.squash("top", "base")
    assert (served.root / "diff/top/big").stat().st_ino == inode


@on_unions
def test_where_nothing_lies_below_no_whiteout_is_left(served: Daemon, client: Client) -> None:
    with client.mounted("top") as path:
        Path(path, "new").mkdir()
        Path(path, "new/f").touch()
    client.checkpoint("top", "n0")
    with client.mounted("top") as path:
        Path(path, "new/f").unlink()
        Path(path, "a/x").unlink()
    client.squash("top", "base")
    # overlayfs would list it, and nobody could open it; fuse-overlayfs marks what it makes opaque
    assert set(os.listdir(served.root / "diff/top/new")) <= {".wh..wh..opq"}
    assert set(os.listdir(served.root / "diff/top/a")) & {"x", ".wh.x"}
    with client.mounted("top") as path:
        assert os.listdir(Path(path, "new")) == []
    assert client.check(deep=True).problems == []


def test_what_cannot_be_squashed_is_refused(served: Daemon, client: Client) -> None:
    def call(kind: type[errors.AufsdError], id: str, onto: str) -> None:
        before = client.list().layers
        with pytest.raises(kind):
            client.squash(id, onto)
        assert client.list().layers == before

    client.checkpoint("top", "n0")
    client.create("stranger")
    call(errors.LayerNotFound, "nosuch", "")
    call(errors.ParentNotFound, "top", "nosuch")
    call(errors.ParentNotFound, "top", "stranger")
    call(errors.ParentNotFound, "top", "top")
    call(errors.LayerSealed, "n0", "base")
    client.create("middle", parent="n0")
    client.create("above", parent="middle")
    call(errors.LayerHasChildren, "middle", "base")
    client.get("top")
    call(errors.LayerInUse, "top", "base")
    client.put("top")
    done = client.squash("top", "n0")
    assert (done.removed, done.kept) == ([], [])


@on_unions
def test_a_chain_at_its_limit_says_what_to_do(served: Daemon, client: Client) -> None:
    length = 0

    def more() -> None:
        nonlocal length
        while length < 600:
            client.checkpoint("top", f"n{length}")
            length += 1

    with pytest.raises(errors.TooManyLayers) as refused:
        more()
    assert "aufsctl squash top" in refused.value.message
    shows = shown(client, "top")
    assert len(client.squash("top", "base").removed) == length
    assert shown(client, "top") == shows
    client.checkpoint("top", "again")
