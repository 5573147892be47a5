"""apply(diff(L)) is L, in every corner; and diff(L) is the same bytes in both dialects."""

import os
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aufsd.store.dialect import WITH_MARKS, Dialect
from tests.archive.shelf import Entry, Shelf, needs_root, open_shelf, snapshot

pytestmark = pytest.mark.mounts

CAP_NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


def files(at: Path) -> None:
    """Modes, owners, xattrs, links."""
    (at / "plain").write_bytes(b"content\n")
    (at / "empty").touch()
    for name, mode in (("setuid", 0o4755), ("setgid", 0o2755), ("sticky", 0o1644), ("none", 0)):
        (at / name).write_bytes(name.encode())
        os.chown(at / name, 1000, 2000)
        (at / name).chmod(mode)
    os.chown(at / "empty", 4_000_000_000, 3_000_000)
    os.link(at / "plain", at / "a-link")
    os.link(at / "plain", at / "z-link")
    os.setxattr(at / "plain", "user.note", b"two\nlines\0and a null")
    os.setxattr(at / "plain", "user.empty", b"")
    os.setxattr(at / "plain", "user.a=b%c%3D", b"=")
    os.setxattr(at / "plain", "user.overlay.opaque", b"y")
    os.setxattr(at / "setuid", "security.capability", CAP_NET_RAW)


def directories(at: Path) -> None:
    """Set-gid directories with files in them, of another group; a root that is not 0755."""
    at.chmod(0o1777)
    os.chown(at, 5, 6)
    os.setxattr(at, "user.root", b"yes")
    for name, mode in (("shared", 0o2775), ("locked", 0o000), ("public", 0o1777)):
        (at / name / "sub").mkdir(parents=True)
        (at / name / "file").write_bytes(b"x")
        os.chown(at / name / "file", 7, 8)
        os.setxattr(at / name, "user.kind", name.encode())
        os.chown(at / name, 9, 10)
        (at / name).chmod(mode)
        os.utime(at / name, (1, 1))
    os.utime(at, (2, 2))


def nodes(at: Path) -> None:
    """Fifos, devices, symlinks."""
    os.mkfifo(at / "fifo", 0o620)
    os.mknod(at / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(at / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70000))
    os.chown(at / "disk", 0, 6)
    (at / "dangling").symlink_to("/no/such/../file")
    (at / "long").symlink_to("x" * 4000)
    os.chown(at / "dangling", 12, 13, follow_symlinks=False)
    os.link(at / "fifo", at / "fifo2")
    os.link(at / "dangling", at / "dangling2", follow_symlinks=False)
    for name in ("fifo", "null", "disk", "dangling", "long"):
        os.utime(at / name, (1e9, 1e9), follow_symlinks=False)


def names(at: Path) -> None:
    """Names that tars find hard."""
    for name in (
        b"new\nline",
        b"  spaces  ",
        "Ünïcödé-文件-🙂".encode(),
        b"\xff\xfe not utf-8 \x80",
        b"\x01\x1b[31m",
        b"-rf",
        b"back\\slash",
        b"n" * 255,
        b"=equals=",
        b"12 path=evil",
        b".hidden",
        b"..dots",
        b".whatever",
        b".w",
    ):
        path = os.fsencode(at) + b"/" + name
        os.mkdir(path)
        with open(path + b"/" + name, "wb") as file:
            file.write(name)
        os.link(path + b"/" + name, path + b"/2")
        os.symlink(name, path + b"/3")


def times(at: Path) -> None:
    """Before 1970, beyond 2038, beyond what ustar's field holds."""
    for name, when in (("old", -86_400), ("older", -(1 << 31)), ("new", 1 << 32), ("far", 1 << 33)):
        (at / name).touch()
        os.utime(at / name, (when, when))
    (at / "fraction").touch()
    os.utime(at / "fraction", ns=(0, 1_999_999_999))
    (at / "before").touch()
    os.utime(at / "before", ns=(0, -1))


def deep(at: Path) -> None:
    """Paths of more than 4096 bytes, with a hard link between two of them."""
    here = os.open(at, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    fd = os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=here)
    os.write(fd, b"deep")
    os.close(fd)
    os.link("file", "link", src_dir_fd=here, dst_dir_fd=here)
    os.close(here)


def large(at: Path) -> None:
    """Bodies around the sizes at which they are copied in another way; a sparse one."""
    for size in (511, 512, 513, 65535, 65536, 65537, 262144, 1 << 20, (1 << 20) + 1, 5_000_000):
        (at / f"f{size}").write_bytes(os.urandom(size))
    with (at / "sparse").open("wb") as file:
        file.seek(3_000_000)
        file.write(b"data")
        file.seek(7_000_000)
        file.write(b"more")
        file.truncate(9_000_001)
    with (at / "hole").open("wb") as file:
        file.truncate(1_000_000)


BUILDERS = [files, directories, nodes, names, times, deep, large]


def settle(at: Path) -> None:
    """No time of day in a snapshot."""
    for directory, _, found in os.walk(os.fsencode(at), topdown=False):
        for name in (*found, b""):
            path = os.path.join(directory, name)
            if os.lstat(path).st_mtime > 1.7e9 and os.lstat(path).st_mtime < 1 << 32:
                os.utime(path, (1.6e9, 1.6e9), follow_symlinks=False)


@needs_root
@pytest.mark.parametrize("dialect", WITH_MARKS)
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
async def test_a_layer_comes_out_as_it_went_in(
    shelf: Shelf, build: Callable[[Path], None], dialect: Dialect
) -> None:
    build(shelf.add("a"))
    if build is not deep:
        settle(shelf.path("a"))
    stream, packed = await shelf.pack("a")
    assert packed.warnings == []
    assert packed.size == len(stream)
    shelf.add("b", dialect)
    applied = await shelf.apply(stream, "b")
    assert applied.warnings == []
    assert applied.entries == packed.entries
    assert applied.size == await shelf.jobs.diff_size(shelf.chain("b"))
    assert await shelf.diff("b") == stream
    if build is deep:
        # its paths are longer than a system call takes
        shutil.rmtree(shelf.path("a"))
        shutil.rmtree(shelf.path("b"))
    else:
        assert snapshot(shelf.path("b")) == snapshot(shelf.path("a"))


@needs_root
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["tar", "--quoting-style=literal", "--null"], id="tar"),
        pytest.param(["bsdtar"], id="bsdtar", marks=pytest.mark.bsdtar),
    ],
)
async def test_what_tools_list_is_what_is_there(shelf: Shelf, command: list[str]) -> None:
    """GNU tar, bsdtar and tarfile agree on every name, also where it is not text."""
    import io
    import tarfile

    at = shelf.add("a")
    for build in (files, directories, nodes, names):
        build(at)
    stream, _ = await shelf.pack("a")
    with tarfile.open(fileobj=io.BytesIO(stream), errors="surrogateescape") as archive:
        members = archive.getmembers()
    ours = [os.fsencode(m.name) + (b"/" if m.isdir() else b"") for m in members]
    with tempfile.NamedTemporaryFile() as file:
        file.write(stream)
        file.flush()
        run = subprocess.run(
            [*command, "-tf", file.name], capture_output=True, env={"LC_ALL": "C.UTF-8"}
        )
    assert (run.returncode, run.stderr) == (0, b"")
    listed = run.stdout
    if command[0] == "tar":
        assert listed == b"".join(name + b"\n" for name in [b"./", *ours[1:]])
    else:
        # it escapes what a terminal could not show
        assert len(listed.splitlines()) == len(ours)
        assert listed.startswith(b"./\n")


@needs_root
async def test_gnu_tar_unpacks_what_we_pack(shelf: Shelf, tmp_path: Path) -> None:
    at = shelf.add("a")
    for build in (files, directories, nodes, names, times, large):
        build(at)
    settle(at)
    stream, _ = await shelf.pack("a")
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(
        ["tar", "-C", out, "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", "-"],
        input=stream,
        check=True,
        capture_output=True,
    )
    assert snapshot(out) == snapshot(at)


@needs_root
async def test_what_gnu_tar_packs_we_unpack(shelf: Shelf, tmp_path: Path) -> None:
    at = tmp_path / "tree"
    at.mkdir()
    for build in (files, directories, nodes, names, times, large):
        build(at)
    # it keeps links of regular files and symlinks only
    (at / "fifo2").unlink()
    settle(at)
    shelf.add("a")
    for options in (
        ["--format=gnu", "--sparse"],
        ["--format=posix", "--sparse", "--sparse-version=1.0"],
        ["--format=posix", "--sparse", "--sparse-version=0.1"],
        ["--format=posix", "--sparse", "--sparse-version=0.0"],
        ["--format=oldgnu", "--sparse"],
    ):
        stream = subprocess.run(
            ["tar", "-C", at, *options, "--xattrs", "--xattrs-include=*", "-cf", "-", "."],
            check=True,
            capture_output=True,
        ).stdout
        shutil.rmtree(shelf.path("a"))
        shelf.add("a")
        result = await shelf.apply(stream, "a")
        assert result.warnings == [], options
        assert snapshot(shelf.path("a")) == snapshot(at), options


async def test_what_was_a_hole_is_one_again(shelf: Shelf) -> None:
    """The stream holds every zero; neither layer does."""
    at = shelf.add("a")
    large(at)
    with (at / "huge").open("wb") as file:
        file.seek(100 << 20)
        file.write(b"end")
    stream = await shelf.diff("a")
    assert len(stream) > 110 << 20
    shelf.add("b")
    await shelf.apply(stream, "b")
    for name in ("sparse", "hole", "huge"):
        found = (shelf.path("b") / name).stat()
        assert found.st_blocks * 512 <= 512 << 10, name
        assert found.st_size == (at / name).stat().st_size
    assert snapshot(shelf.path("b"))[b"huge"].content == snapshot(at)[b"huge"].content


async def test_sockets_are_left_out_and_named(shelf: Shelf) -> None:
    at = shelf.add("a")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(at / "log.sock"))
    (at / "file").touch()
    stream, result = await shelf.pack("a")
    assert result.warnings == ["left out the socket log.sock"]
    assert b"log.sock" not in stream
    assert result.entries == 2


async def test_an_empty_capability_stays_behind(shelf: Shelf) -> None:
    """aufs leaves one where it was removed, and a file that has it cannot be executed."""
    at = shelf.add("a")
    (at / "f").touch()
    # ext4 refuses to make one by setxattr(2); an archive must not hold one either
    stream = await shelf.diff("a")
    assert b"security.capability" not in stream


@pytest.mark.parametrize("dialect", WITH_MARKS)
async def test_housekeeping_never_leaves(shelf: Shelf, dialect: Dialect) -> None:
    at = shelf.add("a", Dialect.AUFS)
    (at / ".wh..wh.aufs").touch(0o444)
    os.link(at / ".wh..wh.aufs", at / ".wh.gone")
    (at / ".wh..wh.orph").mkdir(0o700)
    (at / ".wh..wh.plnk").mkdir(0o700)
    (at / "file").write_bytes(b"linked")
    os.link(at / "file", at / ".wh..wh.plnk" / "12.34")
    (at / "d").mkdir()
    os.link(at / ".wh..wh.aufs", at / "d" / ".wh..wh..opq")
    if dialect is Dialect.OVERLAY:
        assert await shelf.jobs.convert("a", dialect)
    stream, result = await shelf.pack("a")
    assert result.warnings == []
    import io
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        found = [(m.name, m.type, m.mode, m.mtime) for m in archive if ".wh." in m.name]
        names = archive.getnames()
    assert names == [".", ".wh.gone", "d", "d/.wh..wh..opq", "file"]
    assert found == [
        (".wh.gone", tarfile.REGTYPE, 0o444, 0),
        ("d/.wh..wh..opq", tarfile.REGTYPE, 0o444, 0),
    ]


# --- generated trees ----------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "é", "\udcff", "x" * 120, "-", "A b"])
LEAF = st.one_of(
    st.binary(max_size=700),
    st.just(None),  # a whiteout
    st.tuples(st.sampled_from(["a", "../b", "/c"])),  # a symlink
)
TREES = st.recursive(
    st.dictionaries(NAMES, LEAF, max_size=4),
    lambda below: st.dictionaries(NAMES, st.one_of(LEAF, below), max_size=4),
    max_leaves=20,
)


def grow(at: bytes, tree: dict[str, object]) -> None:
    for name, what in tree.items():
        path = at + b"/" + os.fsencode(name)
        if isinstance(what, dict):
            os.mkdir(path)
            grow(path, what)
            if len(what) == 3:
                with open(path + b"/.wh..wh..opq", "wb"):
                    pass
        elif isinstance(what, bytes):
            with open(path, "wb") as file:
                file.write(what)
            os.chmod(path, 0o600 + len(what) % 64)
        elif isinstance(what, tuple):
            os.symlink(what[0], path)
        else:
            with open(at + b"/.wh." + os.fsencode(name), "wb"):
                pass


def but_modes(root: Path | str) -> dict[bytes, Entry]:
    """A snapshot without the permissions of overlayfs's whiteouts."""
    return {
        name: entry._replace(mode=stat.S_IFCHR)
        if stat.S_ISCHR(entry.mode) and not entry.device
        else entry
        for name, entry in snapshot(root).items()
    }


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(TREES, min_size=4, max_size=4))
def test_generated_layers_are_the_same_in_both_dialects(trees: list[dict[str, object]]) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as root:
            async with open_shelf(Path(root)) as shelf:
                for number, tree in enumerate(trees):
                    await check(shelf, tree, str(number))

    async def check(shelf: Shelf, tree: dict[str, object], id: str) -> None:
        grow(os.fsencode(shelf.add(id)), tree)
        stream = await shelf.diff(id)
        # with nothing below them whiteouts are not kept
        below = shelf.add(f"{id}-below")
        for directory, _, _ in os.walk(os.fsencode(shelf.path(id))):
            inside = os.path.relpath(directory, os.fsencode(shelf.path(id)))
            os.makedirs(os.path.join(os.fsencode(below), inside), exist_ok=True)
        for dialect in WITH_MARKS:
            other = f"{id}-{dialect}"
            shelf.add(other, dialect)
            await shelf.apply(stream, other, f"{id}-below")
            assert await shelf.diff(other) == stream
        assert await shelf.jobs.convert(f"{id}-aufs", Dialect.OVERLAY)
        # an archive says no mode of a whiteout: one unpacked has its union's, one converted its own
        assert but_modes(shelf.path(f"{id}-aufs")) == but_modes(shelf.path(f"{id}-overlay"))
        assert await shelf.diff(f"{id}-aufs") == stream
        assert await shelf.jobs.convert(f"{id}-overlay", Dialect.AUFS)
        assert await shelf.diff(f"{id}-overlay") == stream

    trio.run(run)
