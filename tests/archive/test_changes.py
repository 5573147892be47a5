"""What differs between two chains, against a walk of two overlayfs mounts of the same layers."""

import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aufsd.archive.fork import ForkServer
from aufsd.kernel import syscalls
from aufsd.results import Change
from aufsd.store.dialect import WITH_MARKS, Dialect
from aufsd_client.errors import InvalidParams
from tests.archive.shelf import NAMESPACE, Shelf, needs_root, open_shelf
from tests.archive.tars import listing

pytestmark = pytest.mark.mounts


class File(NamedTuple):
    content: str
    mode: int = 0o644
    time: int = 100


class Symlink(NamedTuple):
    target: str
    time: int = 100


class Gone(NamedTuple):
    """A whiteout."""


class Directory(NamedTuple):
    entries: "Tree"
    opaque: bool = False
    mode: int = 0o755


Node: TypeAlias = File | Symlink | Gone | Directory
Tree: TypeAlias = dict[str, Node]
GONE = Gone()

NAMES = st.sampled_from(["a", "b", "a-", "b.b"])
LEAVES = st.one_of(
    st.builds(
        File,
        st.sampled_from(["", "x", "y"]),
        st.sampled_from([0o644, 0o600]),
        st.sampled_from([100, 200]),
    ),
    st.builds(Symlink, st.sampled_from(["a", "../b"]), st.sampled_from([100, 200])),
    st.just(GONE),
)
TREES: st.SearchStrategy[Tree] = st.recursive(
    st.dictionaries(NAMES, LEAVES, max_size=3),
    lambda below: st.dictionaries(
        NAMES,
        st.one_of(
            LEAVES, st.builds(Directory, below, st.booleans(), st.sampled_from([0o755, 0o700]))
        ),
        max_size=4,
    ),
    max_leaves=12,
)


class Layer(NamedTuple):
    tree: Tree
    dialect: Dialect = Dialect.AUFS
    opaque: bool = False


LAYERS = st.builds(Layer, TREES, st.sampled_from(WITH_MARKS), st.booleans())
STACKS = st.lists(LAYERS, min_size=1, max_size=5)
# chains as positions of layers in the stack
CHAINS = st.permutations(range(5))


def build(at: Path, layer: Layer, dialect: Dialect) -> None:
    """Make a layer's content, with the marks of a dialect."""
    fill(at, layer.tree, dialect)
    if layer.opaque:
        make_opaque(at, dialect)
    os.utime(at, (50, 50))


def fill(at: Path, tree: Tree, dialect: Dialect) -> None:
    for name, node in tree.items():
        path = at / name
        match node:
            case File(content, mode, time):
                path.write_text(content)
                path.chmod(mode)
                os.utime(path, (time, time))
            case Symlink(target, time):
                path.symlink_to(target)
                os.utime(path, (time, time), follow_symlinks=False)
            case Gone():
                if dialect is Dialect.AUFS:
                    (at / f".wh.{name}").touch(0o444)
                else:
                    os.mknod(path, stat.S_IFCHR, 0)
            case Directory(entries, opaque, mode):
                path.mkdir()
                fill(path, entries, dialect)
                if opaque:
                    make_opaque(path, dialect)
                path.chmod(mode)
                os.utime(path, (50, 50))


def make_opaque(path: Path, dialect: Dialect) -> None:
    if dialect is Dialect.AUFS:
        (path / ".wh..wh..opq").touch(0o444)
    else:
        os.setxattr(path, f"{NAMESPACE}.overlay.opaque", b"y")


# --- the other way to find out ------------------------------------------------------------------


class Seen(NamedTuple):
    mode: int
    owner: tuple[int, int]
    time: int
    content: bytes


@contextmanager
def mounted(branches: list[Path], target: Path) -> Iterator[Path]:
    options = ["userxattr"] if NAMESPACE == "user" else []
    lowers = ":".join(str(path) for path in branches)
    data = ",".join([f"lowerdir={lowers}", "redirect_dir=nofollow", *options])
    syscalls.mount("none", str(target), "overlay", syscalls.MS_RDONLY, data)
    try:
        yield target
    finally:
        syscalls.umount2(str(target))


def walk(root: Path) -> dict[str, Seen]:
    found = {}
    pending = [root]
    while pending:
        path = pending.pop()
        try:
            status = path.lstat()
        except FileNotFoundError:
            # overlayfs lists the whiteouts of a directory that it need not merge
            continue
        content = b""
        if stat.S_ISDIR(status.st_mode):
            pending += path.iterdir()
        elif stat.S_ISLNK(status.st_mode):
            content = os.fsencode(os.readlink(path))
        else:
            content = path.read_bytes()
        owner = (status.st_uid, status.st_gid)
        time = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
        found["/" + str(path.relative_to(root))] = Seen(status.st_mode, owner, time, content)
    found["/"] = found.pop("/.")
    return found


def compare(now: dict[str, Seen], then: dict[str, Seen]) -> dict[str, str]:
    """Path and kind by the words of api.md."""
    changes: dict[str, str] = {}
    for path, seen in now.items():
        if path not in then:
            changes[path] = "add"
        elif seen != then[path]:
            changes[path] = "modify"
    for path in then:
        above = os.path.dirname(path)
        if path not in now and above in now and stat.S_ISDIR(now[above].mode):
            changes[path] = "delete"
    for path, kind in list(changes.items()):
        above = os.path.dirname(path)
        while kind in ("add", "delete") and above != "/":
            changes.setdefault(above, "modify")
            above = os.path.dirname(above)
    return changes


def in_order(changes: dict[str, str]) -> list[tuple[str, str]]:
    return sorted(changes.items(), key=lambda row: row[0].encode().split(b"/"))


def told(changes: list[Change]) -> list[tuple[str, str]]:
    return [(str(change.path), change.kind) for change in changes]


async def paged(
    shelf: Shelf, chain: tuple[str, ...], against: tuple[str, ...], limit: int
) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    after = ""
    while True:
        page = await shelf.jobs.changes(
            shelf.chain(*chain), against=shelf.chain(*against), after=after, limit=limit
        )
        rows += told(page.changes)
        assert len(page.changes) == limit or not page.next
        after = page.next
        if not after:
            return rows


async def check(shelf: Shelf, stack: list[Layer], now: list[int], then: list[int]) -> None:
    """Every question about two chains, against the two mounts."""
    root = Path(shelf.layout.root)
    # overlayfs wants two directories at least
    bottom, target = [root / "empty", root / "none"], root / "target"
    for path in (*bottom, target):
        path.mkdir()
    for number, layer in enumerate(stack):
        build(shelf.add(f"l{number}", layer.dialect), layer, layer.dialect)
        (root / f"o{number}").mkdir(mode=0o755)
        (root / f"o{number}").chmod(0o755)
        build(root / f"o{number}", layer, Dialect.OVERLAY)

    def see(chain: list[int], *above: Path) -> dict[str, Seen]:
        branches = list(above)
        for number in chain:
            branches.append(root / f"o{number}")
            # overlayfs does not look at this mark of a lower root
            if stack[number].opaque:
                break
        with mounted([*branches, *bottom], target):
            return walk(target)

    chain = tuple(f"l{number}" for number in now)
    against = tuple(f"l{number}" for number in then)
    mine, other = see(now), see(then)
    expected = in_order(compare(mine, other) if then else dict.fromkeys(set(mine) - {"/"}, "add"))
    assert await paged(shelf, chain, against, 10_000) == expected
    assert await paged(shelf, chain, against, 2) == expected

    stream, _ = await shelf.pack(*chain, against=against)
    shelf.add("x", Dialect.OVERLAY)
    await shelf.apply(stream, "x", *against)
    assert see(then, shelf.path("x")) == mine
    assert await paged(shelf, ("x", *against), chain, 100) == []
    files = [path for path, kind in expected if kind != "delete" and stat.S_ISREG(mine[path].mode)]
    size = await shelf.jobs.diff_size(shelf.chain(*chain), against=shelf.chain(*against))
    assert size == sum(len(mine[path].content) for path in files)
    named = [m.name for m in listing(stream) if m.isreg() and ".wh." not in m.name]
    assert [f"/{name}" for name in named] == files


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(STACKS, CHAINS, st.integers(1, 5), CHAINS, st.integers(0, 5), st.booleans())
@example(
    # a file that became a directory and back, through three layers
    [
        Layer({"a": File("x")}),
        Layer({"a": Directory({"b": File("y")})}),
        Layer({"a": Directory({"b": File("x")}, opaque=True)}),
        Layer({"a": File("y")}),
        Layer({}),
    ],
    [3, 2, 1, 0, 4],
    4,
    [2, 1, 0, 3, 4],
    3,
    False,
)
@example(
    # rm -r a; mkdir a in one layer, and a name that is hidden in the middle
    [
        Layer({"a": Directory({"a": File("x"), "b": Directory({"a": File("")})}), "b": File("")}),
        Layer({"a": Directory({"b": GONE}), "b": GONE}),
        Layer({"a": Directory({"a": GONE}), "b": File("y")}),
        Layer({"a": Directory({"b.b": File("y")}, opaque=True), "b": GONE}, Dialect.OVERLAY),
        Layer({}),
    ],
    [3, 2, 1, 0, 4],
    4,
    [1, 0, 2, 3, 4],
    2,
    False,
)
def test_generated_stacks_differ_as_their_mounts_do(
    server: ForkServer,
    stack: list[Layer],
    now: list[int],
    depth: int,
    then: list[int],
    other_depth: int,
    related: bool,
) -> None:
    chain = [number for number in now if number < len(stack)][:depth]
    against = [number for number in then if number < len(stack)][:other_depth]
    if related:
        # as a child and its ancestors
        against = chain[1:]

    async def run() -> None:
        with tempfile.TemporaryDirectory() as root:
            async with open_shelf(Path(root), server) as shelf:
                await check(shelf, stack, chain, against)

    trio.run(run)


# --- what the generated ones do not reach -------------------------------------------------------


async def changed(shelf: Shelf, *chain: str, against: tuple[str, ...]) -> list[tuple[str, str]]:
    return await paged(shelf, chain, against, 1000)


@needs_root
async def test_owners_and_attributes_alone_are_changes(shelf: Shelf) -> None:
    for id in ("base", "top"):
        at = shelf.add(id)
        for name in ("mode", "owner", "xattr", "same"):
            (at / name).write_bytes(b"x")
            (at / f"d-{name}").mkdir()
            (at / f"d-{name}" / "in").write_bytes(b"y")
            for path in (at / name, at / f"d-{name}", at / f"d-{name}" / "in"):
                os.utime(path, (5, 5))
    top = shelf.path("top")
    for prefix in ("", "d-"):
        (top / f"{prefix}mode").chmod(0o4711)
        os.chown(top / f"{prefix}owner", 1, 2)
        os.setxattr(top / f"{prefix}xattr", "user.new", b"")
    os.utime(top / "d-same", (9, 9))
    assert await changed(shelf, "top", "base", against=("base",)) == [
        (f"/{prefix}{name}", "modify")
        for prefix in ("d-", "")
        for name in ("mode", "owner", "xattr")
    ]


async def test_a_file_rewritten_in_the_same_second_with_the_same_size_is_a_change(
    shelf: Shelf,
) -> None:
    for id, text in (("base", b"1.2.3"), ("top", b"1.2.4")):
        at = shelf.add(id)
        (at / "version").write_bytes(text)
        (at / "copied").write_bytes(b"up")
        for name in ("version", "copied"):
            os.utime(at / name, ns=(0, 7_000_000_000 if id == "base" else 7_000_000_005))
    assert await changed(shelf, "top", "base", against=("base",)) == [("/version", "modify")]


async def test_the_root_is_listed_if_it_changed_itself(shelf: Shelf) -> None:
    shelf.add("base")
    shelf.add("top").chmod(0o700)
    assert await changed(shelf, "top", "base", against=("base",)) == [("/", "modify")]
    assert await changed(shelf, "top", against=()) == []


async def test_names_that_are_not_utf_8_and_the_cursor(shelf: Shelf) -> None:
    at = os.fsencode(shelf.add("a"))
    for name in (b"a\xff", b"a\xff/x", b"b"):
        os.mkdir(at + b"/" + name)
    pages = [await shelf.jobs.changes(shelf.chain("a"), against=(), limit=1)]
    while pages[-1].next:
        after = pages[-1].next
        pages.append(await shelf.jobs.changes(shelf.chain("a"), against=(), after=after, limit=1))
    assert [change for page in pages for change in page.changes] == [
        Change("add", path_base64="L2H/"),
        Change("add", path_base64="L2H/L3g="),
        Change("add", path="/b"),
    ]
    with pytest.raises(InvalidParams):
        await shelf.jobs.changes(shelf.chain("a"), against=(), after="no cursor!", limit=1)


async def test_symlinks_of_lower_layers_are_never_followed(shelf: Shelf) -> None:
    """Docker's driver asked the host about what they pointed to (os.Stat in Changes)."""
    base, top = shelf.add("base"), shelf.add("top")
    (base / "etc").symlink_to("/etc")
    (top / "etc").mkdir()
    (top / "etc" / "passwd").touch()
    assert await changed(shelf, "top", "base", against=("base",)) == [
        ("/etc", "modify"),
        ("/etc/passwd", "add"),
    ]


async def test_housekeeping_is_no_change(shelf: Shelf) -> None:
    shelf.add("base")
    at = shelf.add("top")
    (at / ".wh..wh.aufs").touch()
    (at / ".wh..wh.plnk").mkdir()
    (at / ".wh..wh.plnk" / "1.2").touch()
    (at / ".wh..wh.orph").mkdir()
    assert await changed(shelf, "top", "base", against=("base",)) == []


async def test_hard_links_are_one_file_of_the_difference(shelf: Shelf) -> None:
    shelf.add("base")
    at = shelf.add("top")
    (at / "a").write_bytes(b"x" * 1000)
    os.link(at / "a", at / "b")
    chain, base = shelf.chain("top", "base"), shelf.chain("base")
    assert await shelf.jobs.diff_size(chain, against=base) == 1000
    members = listing(await shelf.diff("top", "base", against=("base",)))
    assert [(m.name, m.linkname) for m in members] == [(".", ""), ("a", ""), ("b", "a")]


async def test_deep_trees_are_walked_without_recursion(shelf: Shelf) -> None:
    shelf.add("a")
    at = os.open(shelf.path("a"), os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    assert len(await changed(shelf, "a", against=())) == 1500
    stream = await shelf.diff("a", against=())
    assert stream == await shelf.diff("a")
    shelf.add("b")
    await shelf.apply(stream, "b")
    assert await shelf.diff("b") == stream
    assert await changed(shelf, "b", against=("a",)) == []
    assert await shelf.jobs.diff_size(shelf.chain("b")) == 0
    assert await shelf.jobs.convert("b", Dialect.OVERLAY)
    os.mkdir(f"{shelf.layout.staging}/s")
    await shelf.jobs.clone("b", f"{shelf.layout.staging}/s")
    for id in ("a", "b"):
        _remove(shelf.path(id) / "d")
    _remove(Path(shelf.layout.staging, "s", "d"))


def _remove(path: Path) -> None:
    """Deeper than shutil.rmtree recurses."""
    subprocess.run(["rm", "-r", path], check=True)
