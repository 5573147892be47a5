"""Hostile archives: whatever they ask for, nothing outside the layer is touched."""

import contextlib
import copy
import os
import stat
import tarfile
from pathlib import Path

import pytest

from aufsd.store.dialect import WITH_MARKS, Dialect
from aufsd_client.errors import ArchiveEscape, AufsdError, BadArchive
from tests.archive.shelf import Shelf, snapshot
from tests.archive.tars import CHARACTER, LINK, directory, entry, link, listing, symlink, tar

pytestmark = pytest.mark.mounts


def relinked(info: tarfile.TarInfo, target: str) -> tarfile.TarInfo:
    """A copy with another link target (TarInfo.replace is not in every Python 3.11)."""
    made = copy.copy(info)
    made.linkname = target
    return made


@pytest.fixture
def victim(shelf: Shelf) -> Path:
    """What lies beside the layer on the host: another layer, and a file outside the store."""
    for id in ("victim", "a"):
        shelf.add(id)
    at = shelf.path("victim")
    (at / "hello").write_bytes(b"unharmed")
    (at / "dir").mkdir()
    return at


# after Docker's pkg/archive (testBreakout and its callers): each must leave the victim as it was,
# whether it is refused or what it names is made inside the layer
OUT = "../victim"
MATRIX = {
    "dotdot": [entry(f"{OUT}/hello", b"evil")],
    "slash-dotdot": [entry(f"/../{OUT}/hello", b"evil")],
    "deep-dotdot": [entry(f"x/../../{OUT}/hello", b"evil")],
    "link-out": [link("loophole", f"{OUT}/hello"), entry("loophole", b"evil")],
    "link-out-absolute": [link("loophole", f"/../{OUT}/hello"), entry("loophole", b"evil")],
    "symlink-then-file": [symlink("loophole", OUT), entry("loophole/hello", b"evil")],
    "symlink-up-then-file": [symlink("up", "../../.."), entry("up/etc/evil", b"evil")],
    "symlink-absolute": [symlink("loophole", "{victim}"), entry("loophole/hello", b"evil")],
    "symlink-then-symlink": [
        symlink("one", ".."),
        symlink("one/two", "victim"),
        entry("two/hello", b"evil"),
    ],
    "symlink-then-link": [symlink("loophole", OUT), link("got", "loophole/hello")],
    "link-to-symlink": [
        symlink("loophole", f"{OUT}/hello"),
        link("second", "loophole"),
        entry("second", b"evil"),
    ],
    "file-over-symlink": [symlink("loophole", f"{OUT}/hello"), entry("loophole", b"evil")],
    "directory-over-symlink": [
        symlink("loophole", OUT),
        directory("loophole", mode=0o777),
        entry("loophole/hello", b"evil"),
    ],
    "replaced-symlink": [
        directory("d"),
        symlink("d", OUT),
        entry("d/hello", b"evil"),
    ],
    "mode-through-symlink": [
        symlink("loophole", f"{OUT}/dir"),
        directory("loophole/", mode=0o7777),
    ],
    "whiteout-through-symlink": [symlink("loophole", OUT), entry("loophole/.wh.hello")],
    "opaque-through-symlink": [symlink("loophole", OUT), entry("loophole/.wh..wh..opq")],
    "whiteout-dotdot": [entry(f"{OUT}/.wh.hello")],
    "directory-dotdot": [directory(OUT, mode=0o777)],
    "proc": [symlink("p", "/proc/self/root"), entry("p/tmp/evil", b"evil")],
    "fd": [symlink("p", "/proc/self/fd/3"), entry("p/evil", b"evil")],
}


@pytest.mark.parametrize("dialect", WITH_MARKS)
@pytest.mark.parametrize("attack", MATRIX)
async def test_the_breakout_matrix(
    shelf: Shelf, victim: Path, attack: str, dialect: Dialect
) -> None:
    before = snapshot(victim)
    siblings = sorted(os.listdir(shelf.layout.diff)) + sorted(os.listdir(shelf.layout.root))
    shelf.path("a").rmdir()
    shelf.add("a", dialect)
    entries = [
        (relinked(info, info.linkname.replace("{victim}", str(victim))), data)
        for info, data in MATRIX[attack]
    ]
    with contextlib.suppress(ArchiveEscape, BadArchive):
        await shelf.apply(tar(*entries), "a", "victim")
    assert snapshot(victim) == before
    assert sorted(os.listdir(shelf.layout.diff)) + sorted(os.listdir(shelf.layout.root)) == siblings
    assert not Path("/etc/evil").exists()
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("..", "../x", "/..", "/../x", "a/../../x", "./../x", "a/b/../../../x", "a/../.."),
        *(".wh.", ".wh..", ".wh...", "d/.wh.", "d/.wh..", "d/.wh..."),
        *(".wh..wh.x", "d/.wh..wh.aufs", "d/.wh..wh.plnk/1.2", ".wh..wh..wh.x", "d/.wh..wh.orph"),
        *(".wh.x/y", "d/.wh.x/y", ".wh..wh..opq/x", ".wh.x/.wh.y"),
    ],
)
@pytest.mark.parametrize("dialect", WITH_MARKS)
async def test_names_that_leave_or_forge_are_refused(
    shelf: Shelf, name: str, dialect: Dialect
) -> None:
    shelf.add("a", dialect)
    with pytest.raises(ArchiveEscape) as caught:
        await shelf.apply(tar(directory("d"), entry("ok"), entry(name)), "a")
    assert caught.value.data["entry"] == name
    assert caught.value.data["offset"] == 1024


@pytest.mark.parametrize(
    "target", ["../victim/hello", "/../x", "a/../../x", ".wh.x", "d/.wh..wh.y"]
)
async def test_links_that_leave_or_forge_are_refused(shelf: Shelf, target: str) -> None:
    shelf.add("a")
    with pytest.raises(ArchiveEscape):
        await shelf.apply(tar(entry(".wh.x"), directory("d"), link("l", target)), "a")


@pytest.mark.parametrize(
    "kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
async def test_a_whiteout_is_a_regular_file_or_refused(shelf: Shelf, kind: bytes) -> None:
    """aufs answers EIO to every lookup beside one that is something else (au_wh_test())."""
    shelf.add("a")
    with pytest.raises(ArchiveEscape):
        await shelf.apply(tar(entry(".wh.x", type=kind, linkname="y")), "a")


async def test_housekeeping_is_dropped_with_a_warning(shelf: Shelf) -> None:
    shelf.add("a")
    stream = tar(
        entry(".wh..wh.aufs"),
        directory(".wh..wh.orph"),
        entry(".wh..wh.orph/x", b"x"),
        directory(".wh..wh.plnk"),
        entry("file", b"f"),
    )
    result = await shelf.apply(stream, "a")
    assert result.warnings == [
        f"left out .wh..wh.{name}, which aufs keeps for itself" for name in ("aufs", "orph", "plnk")
    ]
    assert os.listdir(shelf.path("a")) == ["file"]
    assert result.size == 1


@pytest.mark.parametrize("dialect", WITH_MARKS)
async def test_a_device_that_reads_as_a_whiteout(shelf: Shelf, dialect: Dialect) -> None:
    """0:0 is what overlayfs takes for a deleted file; for aufs it is a device like any other."""
    shelf.add("a", dialect)
    stream = tar(entry("d", type=CHARACTER, devmajor=0, devminor=0))
    if dialect is Dialect.OVERLAY:
        with pytest.raises(ArchiveEscape):
            await shelf.apply(stream, "a")
    else:
        await shelf.apply(stream, "a")
        assert stat.S_ISCHR((shelf.path("a") / "d").lstat().st_mode)
        assert [m.type for m in listing(await shelf.diff("a"))] == [tarfile.DIRTYPE, CHARACTER]


@pytest.mark.parametrize("dialect", WITH_MARKS)
async def test_a_link_to_a_deleted_name_makes_no_second_whiteout(
    shelf: Shelf, dialect: Dialect
) -> None:
    shelf.add("a", dialect)
    with pytest.raises(BadArchive):
        await shelf.apply(tar(entry(".wh.x"), link("y", "x")), "a")


async def test_forged_attributes_are_dropped_with_a_warning(shelf: Shelf) -> None:
    shelf.add("a", Dialect.OVERLAY)
    forged = {
        "SCHILY.xattr.trusted.overlay.opaque": "y",
        "SCHILY.xattr.trusted.overlay.redirect": "/",
        "SCHILY.xattr.user.aufsd.dialect": "aufs",
        "SCHILY.xattr.user.fuseoverlayfs.opaque": "y",
        "SCHILY.xattr.security.selinux": "x",
        "SCHILY.xattr.system.posix_acl_access": "x",
        "SCHILY.xattr.user.fine": "yes",
    }
    stream = tar(directory("d", pax_headers=forged), directory(".", pax_headers=forged))
    result = await shelf.apply(stream, "a")
    assert len(result.warnings) == 12
    assert "dropped the attribute trusted.overlay.opaque of d" in result.warnings
    for path in (shelf.path("a"), shelf.path("a") / "d"):
        assert set(os.listxattr(path)) - {"trusted.aufsd.dialect", "user.aufsd.dialect"} <= {
            "user.fine",
            "security.selinux",
        }


async def test_attributes_of_symlinks_are_dropped_with_a_warning(shelf: Shelf) -> None:
    shelf.add("a")
    records = {"SCHILY.xattr.user.a": "b", "SCHILY.xattr.trusted.a": "b"}
    stream = tar(entry("l", type=tarfile.SYMTYPE, linkname="x", pax_headers=records))
    assert len((await shelf.apply(stream, "a")).warnings) == 2


async def test_no_more_than_a_hundred_warnings_are_said(shelf: Shelf) -> None:
    shelf.add("a")
    bad = {"SCHILY.xattr.trusted.x": "y"}
    result = await shelf.apply(tar(*(entry(str(n), pax_headers=bad) for n in range(250))), "a")
    assert len(result.warnings) == 101
    assert result.warnings[-1] == "and 150 more"


async def test_the_root_stays_a_directory(shelf: Shelf) -> None:
    shelf.add("a")
    for evil in (entry(".", b"x"), symlink("./", "/"), entry("/", type=LINK, linkname="x")):
        with pytest.raises(ArchiveEscape):
            await shelf.apply(tar(entry("x"), evil), "a")


async def test_what_a_symlink_of_the_archive_leads_to_is_inside(shelf: Shelf) -> None:
    """Real layers hold lib -> usr/lib and then lib/x, as debootstrap's merged /usr does."""
    shelf.add("a")
    stream = tar(
        directory("usr"),
        directory("usr/lib"),
        symlink("lib", "usr/lib"),
        symlink("abs", "/usr/lib"),
        entry("lib/x", b"1"),
        entry("abs/y", b"2"),
        entry("lib/.wh.gone"),
        entry("usr/lib/gone", b"3"),
        link("lib/z", "abs/y"),
    )
    await shelf.apply(stream, "a")
    at = shelf.path("a")
    assert sorted(os.listdir(at / "usr/lib")) == ["gone", "x", "y", "z"]
    assert (at / "usr/lib/z").samefile(at / "usr/lib/y")
    assert (at / "usr/lib").stat().st_mtime == 1_500_000_000
    assert (at / "lib").is_symlink()


async def test_a_circle_of_symlinks_is_a_bad_archive(shelf: Shelf) -> None:
    shelf.add("a")
    for entries in (
        [symlink("a", "b"), symlink("b", "a"), entry("a/x")],
        [symlink("dangling", "nowhere"), entry("dangling/x")],
        [entry("file"), entry("file/x")],
    ):
        with pytest.raises(BadArchive):
            await shelf.apply(tar(*entries), "a")


async def test_nothing_of_the_host_is_in_sight(shelf: Shelf, tmp_path: Path) -> None:
    """A layer's own symlinks lead nowhere on the host, in any job."""
    at = shelf.add("a")
    (tmp_path / "secret").write_bytes(b"secret")
    (at / "leak").symlink_to(tmp_path / "secret")
    (at / "tree").symlink_to(tmp_path)
    (at / "real").mkdir()
    shelf.add("b")
    (shelf.path("b") / "leak").symlink_to(tmp_path / "other")
    for against in (None, (), ("b",)):
        assert b"secret" not in (await shelf.diff("a", against=against)).replace(
            bytes(tmp_path / "secret"), b""
        )
    changes = await shelf.jobs.changes(shelf.chain("a"), against=())
    assert [change.path for change in changes.changes] == ["/leak", "/real", "/tree"]


async def test_an_error_is_a_sentence_of_the_table(shelf: Shelf) -> None:
    shelf.add("a")
    with pytest.raises(AufsdError) as caught:
        await shelf.apply(tar(entry("../\x1b[31m\n")), "a")
    assert caught.value.code == 302
    assert "\x1b" not in caught.value.message
    assert caught.value.message.isprintable()
