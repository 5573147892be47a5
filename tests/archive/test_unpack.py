"""What the entries of a tar mean to a layer: marks, merges, implied directories, links."""

import os
import stat
import tarfile
from pathlib import Path

import pytest

from aufsd.archive.fork import ForkServer
from aufsd.store import whiteouts
from aufsd.store.dialect import WITH_MARKS, Dialect
from aufsd_client.errors import BadArchive
from tests.archive.shelf import NAMESPACE, Shelf, needs_root, open_shelf, snapshot
from tests.archive.tars import directory, entry, link, listing, symlink, tar

pytestmark = pytest.mark.mounts


async def names(shelf: Shelf, id: str) -> list[str]:
    """What a layer holds, marks as in a tar."""
    return [member.name for member in listing(await shelf.diff(id))][1:]


@pytest.fixture(params=WITH_MARKS)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return Dialect(request.param)


async def test_marks_stand_on_disk_as_the_dialect_has_them(shelf: Shelf) -> None:
    (shelf.add("base") / "e").mkdir()
    stream = tar(entry(".wh.gone"), directory("d"), entry("d/.wh..wh..opq"), entry("e/.wh.x"))
    at = shelf.add("a")
    await shelf.apply(stream, "a", "base")
    for path in (at / ".wh.gone", at / "d" / ".wh..wh..opq", at / "e" / ".wh.x"):
        found = path.lstat()
        assert stat.S_ISREG(found.st_mode)
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_size) == (0o444, 0, 0)
        assert (found.st_mtime, found.st_nlink) == (0, 3)
    at = shelf.add("o", Dialect.OVERLAY)
    await shelf.apply(stream, "o", "base")
    assert sorted(os.listdir(at)) == ["d", "e", "gone"]
    assert whiteouts.is_whiteout_node((at / "gone").lstat())
    assert whiteouts.is_whiteout_node((at / "e" / "x").lstat())
    assert whiteouts.has_opaque_xattr(at / "d", NAMESPACE)
    assert os.listdir(at / "e") == ["x"]


async def test_linked_whiteouts_of_a_docker_layer_are_whiteouts(
    shelf: Shelf, dialect: Dialect
) -> None:
    shelf.add("a", dialect)
    stream = tar(entry(".wh.a"), link(".wh.b", ".wh.a"), link("d/.wh..wh..opq", ".wh.a"))
    await shelf.apply(stream, "a")
    assert await names(shelf, "a") == [".wh.a", ".wh.b", "d", "d/.wh..wh..opq"]


@pytest.mark.parametrize("whiteout_first", [False, True])
@pytest.mark.parametrize("merged", [False, True])
async def test_a_file_and_its_whiteout_in_one_tar(
    shelf: Shelf, dialect: Dialect, whiteout_first: bool, merged: bool
) -> None:
    """The file stays, and hides what lies below by itself; a directory is opaque for that."""
    shelf.add("a", dialect)
    if merged:
        await shelf.apply(
            tar(directory("d"), entry("d/old"), directory("f"), entry("f/old"), entry("keep")), "a"
        )
    entries = [
        [entry(".wh.f"), entry(".wh.d"), entry(".wh.l")],
        [entry("f", b"new"), directory("d"), entry("d/new"), symlink("l", "f")],
    ]
    stream = tar(*(row for part in (entries if whiteout_first else entries[::-1]) for row in part))
    result = await (shelf.merge if merged else shelf.apply)(stream, "a")
    assert result.size == 3
    assert await names(shelf, "a") == [
        "d",
        "d/.wh..wh..opq",
        "d/new",
        "f",
        *(["keep"] if merged else []),
        "l",
    ]
    assert result.size == await shelf.jobs.diff_size(shelf.chain("a"))


async def test_a_whiteout_removes_what_an_earlier_archive_put_there(
    shelf: Shelf, dialect: Dialect
) -> None:
    shelf.add("a", dialect)
    first = tar(
        entry("file", b"1"),
        directory("tree"),
        directory("tree/sub"),
        entry("tree/sub/x", b"2"),
        entry(".wh.already"),
        symlink("link", "file"),
        entry("other", b"3"),
    )
    await shelf.apply(first, "a")
    gone = ("file", "tree", "already", "link", "unknown")
    result = await shelf.merge(tar(*(entry(f".wh.{name}") for name in gone)), "a")
    assert await names(shelf, "a") == [*sorted(f".wh.{name}" for name in gone), "other"]
    assert result.size == 1


async def test_what_is_put_over_a_whiteout_of_an_earlier_archive(
    shelf: Shelf, dialect: Dialect
) -> None:
    shelf.add("a", dialect)
    await shelf.apply(tar(*(entry(f".wh.{name}") for name in "fdli")), "a")
    await shelf.merge(
        tar(entry("f"), directory("d"), symlink("l", "f"), entry("i/x"), link("d/h", "f")), "a"
    )
    # a directory in the place of a deleted one does not show what was in that
    assert await names(shelf, "a") == [
        "d",
        "d/.wh..wh..opq",
        "d/h",
        "f",
        "i",
        "i/.wh..wh..opq",
        "i/x",
        "l",
    ]


async def test_a_directory_in_the_place_of_a_file_does_not_show_what_the_file_hid(
    shelf: Shelf, dialect: Dialect
) -> None:
    base = shelf.add("base", dialect)
    (base / "x").mkdir()
    (base / "x" / "hidden").touch()
    shelf.add("a", dialect)
    await shelf.apply(tar(entry("x", b"file")), "a", "base")
    await shelf.merge(tar(directory("x"), entry("x/new")), "a", "base")
    assert await names(shelf, "a") == ["x", "x/.wh..wh..opq", "x/new"]
    # within one archive the last entry of a name counts, as for any tar
    shelf.add("b", dialect)
    await shelf.apply(tar(entry("x"), directory("x"), entry("x/new")), "b", "base")
    assert await names(shelf, "b") == ["x", "x/new"]


async def test_an_opaque_mark_hides_what_came_before_and_not_what_comes_with_it(
    shelf: Shelf, dialect: Dialect
) -> None:
    shelf.add("a", dialect)
    old = [directory("d"), directory("d/e"), directory("d/e/f")]
    await shelf.apply(
        tar(*old, entry("d/1"), entry("d/e/2"), entry("d/e/f/3"), entry("d/.wh.4"), entry("5")), "a"
    )
    stream = tar(
        entry("d/e/f/new"),
        entry("d/e/.wh.gone"),
        entry("d/.wh..wh..opq"),
        entry("d/late"),
    )
    await shelf.merge(stream, "a")
    assert await names(shelf, "a") == [
        "5",
        "d",
        "d/.wh..wh..opq",
        "d/e",
        "d/e/f",
        "d/e/f/new",
        "d/late",
    ]
    await shelf.merge(tar(entry(".wh..wh..opq"), entry("last")), "a")
    assert await names(shelf, "a") == [".wh..wh..opq", "last"]


async def test_layers_of_whiteouts_as_docker_tests_them(shelf: Shelf, dialect: Dialect) -> None:
    """pkg/archive, TestApplyLayerWhiteouts: the same layers, on one layer with nothing below it."""
    shelf.add("a", dialect)
    layers = [
        ["./", ".baz", ".wh.foo", "bar/", "bax", "bay/.wh.baz", "bay/.wh..wh..opq", "f/"],
        [".bay", ".wh..baz", "foobar/foo", ".wh.bar", "bay/x"],
        [".abc", ".wh..bay", "foobar/.wh.foo"],
    ]
    for number, layer in enumerate(layers):
        stream = tar(*(directory(n) if n.endswith("/") else entry(n) for n in layer))
        await (shelf.merge if number else shelf.apply)(stream, "a")
    assert await names(shelf, "a") == [
        ".abc",
        ".wh..bay",
        ".wh..baz",
        ".wh.bar",
        ".wh.foo",
        "bax",
        "bay",
        "bay/.wh..wh..opq",
        "bay/x",
        "f",
        "foobar",
    ]


# --- implied directories ------------------------------------------------------------------------


@needs_root
async def test_implied_directories_are_as_in_the_layers_below(
    shelf: Shelf, dialect: Dialect
) -> None:
    """Docker made them 0755 root, which hid the owner and mode of the directory below."""
    base, middle = shelf.add("base", Dialect.AUFS), shelf.add("middle", Dialect.OVERLAY)
    (base / "tmp" / "x").mkdir(parents=True)
    (base / "tmp").chmod(0o1777)
    os.chown(base / "tmp" / "x", 5, 6)
    os.setxattr(base / "tmp" / "x", "user.a", b"b")
    os.utime(base / "tmp" / "x", (77, 77))
    (middle / "tmp").mkdir(mode=0o700)
    os.utime(middle / "tmp", (88, 88))
    (base / "gone").mkdir(mode=0o711)
    os.mknod(middle / "gone", stat.S_IFCHR, 0)
    (base / "cut" / "in").mkdir(parents=True, mode=0o711)
    (middle / "cut").mkdir(mode=0o711)
    os.setxattr(middle / "cut", f"{NAMESPACE}.overlay.opaque", b"y")
    (base / "link").symlink_to("tmp")
    at = shelf.add("a", dialect)
    stream = tar(
        entry("tmp/x/f"), entry("gone/f"), entry("cut/in/f"), entry("link/f"), entry("new/sub/f")
    )
    await shelf.apply(stream, "a", "middle", "base")

    def of(name: str) -> tuple[int, int, int, float]:
        found = (at / name).lstat()
        return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime

    assert of("tmp") == (0o700, 0, 0, 88)
    assert of("tmp/x") == (0o755, 5, 6, 77)
    assert os.getxattr(at / "tmp" / "x", "user.a") == b"b"
    assert of("cut")[0] == 0o711
    for name in ("gone", "cut/in", "new", "new/sub", "link"):
        # nothing below shows there, or it is no directory
        assert of(name) == (0o755, 0, 0, 1_500_000_000), name
    assert (at / "link").is_dir()
    assert not (at / "link").is_symlink()


@needs_root
async def test_an_entry_that_comes_after_its_content_still_counts(
    shelf: Shelf, dialect: Dialect
) -> None:
    at = shelf.add("a", dialect)
    await shelf.apply(
        tar(entry("d/e/f"), directory("d/e", mode=0o2711, uid=3), directory("d", mtime=5)), "a"
    )
    assert (at / "d").stat().st_mtime == 5
    found = (at / "d" / "e").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o2711, 3)


# --- links --------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("merged", [False, True])
async def test_pseudo_links_become_links(shelf: Shelf, dialect: Dialect, merged: bool) -> None:
    """aufs's plnk directory, as docker save wrote it out (moby#4178)."""
    at = shelf.add("a", dialect)
    if merged:
        await shelf.apply(tar(entry("old", b"old")), "a")
    stream = tar(
        directory(".wh..wh.plnk"),
        entry(".wh..wh.plnk/288.1234", b"content", mode=0o755, uid=7),
        link("one", ".wh..wh.plnk/288.1234"),
        link("d/two", "./.wh..wh.plnk/288.1234"),
    )
    result = await (shelf.merge if merged else shelf.apply)(stream, "a")
    at = shelf.path("a")
    assert (at / "one").read_bytes() == b"content"
    assert (at / "one").samefile(at / "d" / "two")
    assert (at / "one").stat().st_uid == 7
    assert (at / "one").stat().st_nlink == 2
    assert result.size == 7 + 3 * merged
    assert await names(shelf, "a") == ["d", "d/two", *(["old"] if merged else []), "one"]
    with pytest.raises(BadArchive, match=r"hard link to \.wh\.\.wh\.plnk/1\.1"):
        await shelf.apply(tar(link("x", ".wh..wh.plnk/1.1")), "a")


@pytest.mark.parametrize("target", ["nothing", "a/b", "self", "dir"])
async def test_a_link_to_nothing_of_the_layer_is_a_bad_archive(shelf: Shelf, target: str) -> None:
    base = shelf.add("base")
    (base / "nothing").touch()
    shelf.add("a")
    with pytest.raises(BadArchive):
        await shelf.apply(tar(directory("dir"), link("self", target)), "a", "base")


@needs_root
async def test_a_link_keeps_what_its_target_has(shelf: Shelf) -> None:
    at = shelf.add("a")
    stream = tar(
        entry("x", b"x", mode=0o4711, uid=9), entry("y", type=tarfile.LNKTYPE, linkname="x")
    )
    await shelf.apply(stream, "a")
    found = (at / "y").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_mtime) == (0o4711, 9, 1_500_000_000)


# --- merging ------------------------------------------------------------------------------------


@needs_root
async def test_a_merge_never_changes_the_live_layer(shelf: Shelf, dialect: Dialect) -> None:
    """Its regular files are the same inodes in staging, until they are replaced."""
    at = shelf.add("a", dialect)
    await shelf.apply(
        tar(
            directory(".", mode=0o700, uid=4),
            entry("same", b"1"),
            entry("changed", b"2", pax_headers={"SCHILY.xattr.user.a": "b"}),
            link("linked", "changed"),
            directory("d", mode=0o750, mtime=4),
            entry("d/in", b"3"),
            entry(".wh.w"),
            entry("d/.wh..wh..opq"),
        ),
        "a",
    )
    before, held = snapshot(at), os.open(at, os.O_RDONLY)
    result = await shelf.merge(
        tar(
            entry("changed", b"two", mode=0o4755, uid=1, mtime=9),
            link("again", "linked"),
            entry("d/in", b"three", mtime=9),
            entry("d/more", b"4"),
            directory("d", mode=0o777, mtime=9),
        ),
        "a",
    )
    live = Path(f"/proc/self/fd/{held}")
    assert snapshot(live.resolve()) == before
    os.close(held)
    now = shelf.path("a")
    assert (now / "changed").read_bytes() == b"two"
    assert (now / "linked").read_bytes() == b"2"
    assert (now / "linked").samefile(now / "again")
    assert (now / "d").stat().st_mtime == 9
    assert now.stat().st_uid == 4
    assert result.size == await shelf.jobs.diff_size(shelf.chain("a")) == 1 + 3 + 1 + 5 + 1


async def test_directories_that_an_archive_only_passes_keep_their_time(
    shelf: Shelf, dialect: Dialect
) -> None:
    shelf.add("a", dialect)
    await shelf.apply(tar(directory(".", mtime=3), directory("d", mtime=4), entry("d/x")), "a")
    await shelf.merge(tar(entry("d/y"), entry("z")), "a")
    assert (shelf.path("a") / "d").stat().st_mtime == 4
    assert shelf.path("a").stat().st_mtime == 3


@needs_root
async def test_an_entry_says_all_that_a_merged_directory_has(shelf: Shelf) -> None:
    shelf.add("a")
    old = {"SCHILY.xattr.user.old": "1", "SCHILY.xattr.user.both": "2"}
    new = {"SCHILY.xattr.user.new": "3", "SCHILY.xattr.user.both": "4"}
    await shelf.apply(tar(directory("d", mode=0o2777, uid=5, gid=6, pax_headers=old)), "a")
    await shelf.merge(tar(directory("d", mode=0o711, pax_headers=new)), "a")
    found = shelf.path("a") / "d"
    assert stat.S_IMODE(found.stat().st_mode) == 0o711
    assert (found.stat().st_uid, found.stat().st_gid) == (0, 0)
    assert {n: os.getxattr(found, n) for n in os.listxattr(found) if n.startswith("user.")} == {
        "user.new": b"3",
        "user.both": b"4",
    }


@pytest.mark.parametrize("merged", [False, True])
async def test_the_last_entry_of_a_name_counts(
    shelf: Shelf, dialect: Dialect, merged: bool
) -> None:
    kinds = [entry("x", b"1"), directory("x"), symlink("x", "t"), link("x", "t")]
    for number, (first, second) in enumerate((a, b) for a in kinds for b in kinds):
        id = str(number)
        shelf.add(id, dialect)
        if merged:
            await shelf.apply(tar(entry("t"), first), id)
            await shelf.merge(tar(entry("t"), second), id)
        else:
            await shelf.apply(tar(entry("t"), first, second), id)
        [found] = [m for m in listing(await shelf.diff(id)) if m.name == "x"]
        assert found.type == second[0].type
        assert found.size == len(second[1])


# --- kinds --------------------------------------------------------------------------------------


async def test_what_is_no_file_is_left_out_and_named(shelf: Shelf) -> None:
    shelf.add("a")
    stream = tar(entry("label", type=b"V"), entry("x", b"y"), entry("old", b"z", type=b"7"))
    result = await shelf.apply(stream, "a")
    assert len(result.warnings) == 1
    assert await names(shelf, "a") == ["old", "x"]
    with pytest.raises(BadArchive, match="unknown type"):
        await shelf.apply(tar(entry("odd", type=b"Z")), "a")


@pytest.mark.parametrize(
    "bad",
    [
        entry("x" * 256),
        symlink("x", "y" * 4096),
        symlink("x", ""),
        entry("x", type=tarfile.CHRTYPE, devmajor=4096, devminor=0),
        entry("x", type=tarfile.BLKTYPE, devmajor=1, devminor=1 << 20),
    ],
)
async def test_what_no_file_system_takes_is_a_bad_archive(
    shelf: Shelf, bad: tuple[tarfile.TarInfo, bytes]
) -> None:
    shelf.add("a")
    with pytest.raises(BadArchive):
        await shelf.apply(tar(bad), "a")


async def test_an_umask_does_not_count(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        async with open_shelf(tmp_path) as shelf:
            at = shelf.add("a")
            stream = tar(entry("f", mode=0o666), directory("d", mode=0o777), entry("i/x"))
            await shelf.apply(stream, "a")
            assert stat.S_IMODE((at / "f").stat().st_mode) == 0o666
            assert stat.S_IMODE((at / "d").stat().st_mode) == 0o777
            assert stat.S_IMODE((at / "i").stat().st_mode) == 0o755
    finally:
        os.umask(before)


async def test_content_is_on_disk_when_sync_is_asked_for(
    tmp_path: Path, server: ForkServer
) -> None:
    async with open_shelf(tmp_path, server, sync="filesystem") as shelf:
        shelf.add("a")
        assert (await shelf.apply(tar(entry("f", b"x" * 100_000)), "a")).size == 100_000
