"""Any layer, converted there and back: byte for byte and attribute for attribute."""

import os
import stat
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aufsd.store import dialect as marks
from aufsd.store import whiteouts
from aufsd.store.dialect import WITH_MARKS, Dialect
from tests.archive.converting import convert
from tests.archive.shelf import NAMESPACE, snapshot

# a name that no whiteout can have the name of, and one that has just room for it
NAMES = st.one_of(
    st.sampled_from([b"a", b"b", b".x", b".w", b"opq", b"\xff", "\u00e9".encode(), b"n" * 251]),
    st.binary(min_size=1, max_size=8).filter(
        lambda name: not set(name) & set(b"/\0") and name not in (b".", b"..")
    ),
).filter(lambda name: not name.startswith(whiteouts.WHITEOUT))
MODES = st.sampled_from([0o644, 0o600, 0o755, 0o1777, 0o2755, 0o4711, 0o000])
TIMES = st.integers(0, 2**32 * 10**9)


@dataclass(frozen=True)
class Node:
    """A name of a layer: what it is, and what is in it."""

    kind: str
    mode: int = 0o644
    time: int = 0
    text: bytes = b""
    opaque: bool = False
    below: tuple[tuple[bytes, "Node"], ...] = ()


LEAVES = st.builds(
    Node,
    st.sampled_from(["file", "symlink", "fifo", "whiteout", "link"]),
    MODES,
    TIMES,
    st.binary(min_size=1, max_size=20).filter(lambda text: b"\0" not in text),
)
TREES = st.recursive(
    LEAVES,
    lambda nodes: st.builds(
        Node,
        st.just("dir"),
        MODES.map(lambda mode: mode | 0o700),
        TIMES,
        opaque=st.booleans(),
        below=st.dictionaries(NAMES, nodes, max_size=5).map(lambda found: tuple(found.items())),
    ),
    max_leaves=15,
)
LAYERS = TREES.filter(lambda node: node.kind == "dir")


def build(at: bytes, node: Node, dialect: Dialect, first: list[bytes]) -> None:
    """Make what a node says; `first` is the file that links are made to, once there is one."""
    if node.kind == "dir":
        os.makedirs(at, exist_ok=True)
        for name, below in node.below:
            build(at + b"/" + name, below, dialect, first)
        if node.opaque and dialect is Dialect.AUFS:
            mark(at + b"/" + whiteouts.OPAQUE)
        elif node.opaque:
            os.setxattr(at, whiteouts.opaque_xattr(NAMESPACE), b"y")
    elif node.kind == "whiteout":
        directory, _, name = at.rpartition(b"/")
        if dialect is Dialect.AUFS:
            at = directory + b"/" + whiteouts.WHITEOUT + name
            mark(at)
        else:
            os.mknod(at, stat.S_IFCHR, os.makedev(0, 0))
    elif node.kind == "symlink":
        os.symlink(node.text, at)
    elif node.kind == "fifo":
        os.mkfifo(at)
    elif node.kind == "link" and first:
        os.link(first[0], at)
        return
    else:
        with open(at, "wb") as file:
            file.write(node.text)
        os.setxattr(at, "user.note", node.text)
        first.append(at)
    if node.kind != "symlink":
        os.chmod(at, node.mode)
    os.utime(at, ns=(0, node.time), follow_symlinks=False)


def mark(path: bytes) -> None:
    os.mknod(path, stat.S_IFREG | 0o444)
    os.utime(path, ns=(0, 0))


def made(at: Path, layer: Node, dialect: Dialect) -> Path:
    build(os.fsencode(at), layer, dialect, [])
    marks.write_dialect(at, dialect, NAMESPACE)
    return at


def times(at: Path) -> dict[str, int]:
    """To the nanosecond, of whiteouts too, but not of what makes a directory opaque."""
    return {
        os.path.join(directory, name.removeprefix(".wh.")): os.lstat(
            os.path.join(directory, name)
        ).st_mtime_ns
        for directory, names, files in os.walk(at)
        for name in (".", *names, *files)
        if name != os.fsdecode(whiteouts.OPAQUE)
    }


def kept(node: Node, *, cut: bool = False, top: bool = True) -> Node:
    """What a conversion keeps: whiteouts where nothing lies below hide nothing."""
    below = cut or node.opaque
    return replace(
        node,
        below=tuple(
            (name, kept(inner, cut=below, top=False))
            for name, inner in node.below
            if top or not below or inner.kind != "whiteout"
        ),
    )


# an ordinary user cannot read the files that have no mode
@pytest.mark.mounts
@given(layer=LAYERS, source=st.sampled_from(WITH_MARKS))
@settings(deadline=None, max_examples=150)
def test_any_layer_is_the_same_there_and_back(layer: Node, source: Dialect) -> None:
    target = next(dialect for dialect in WITH_MARKS if dialect is not source)
    with tempfile.TemporaryDirectory() as directory:
        layer = kept(layer)
        here = made(Path(directory, "here"), layer, source)
        there = made(Path(directory, "there"), layer, target)
        before, exact = snapshot(here), times(here)
        assert convert(here, target) == 0
        assert snapshot(here) == snapshot(there)
        assert times(here) == exact
        assert convert(here, source) == 0
        assert snapshot(here) == before
        assert times(here) == exact


@pytest.mark.parametrize("source", WITH_MARKS)
def test_whiteouts_that_hide_nothing_are_not_written_again(tmp_path: Path, source: Dialect) -> None:
    """overlayfs lists them where it does not merge; stores that have them are healed."""
    target = next(dialect for dialect in WITH_MARKS if dialect is not source)
    gone, file = Node("whiteout", 0o444, 0, b""), Node("file", 0o644, 5, b"x")
    rows = ((b"gone", gone), (b"kept", file))
    inner = Node("dir", 0o755, 7, b"", below=rows)
    layer = Node(
        "dir",
        *(0o755, 7, b""),
        below=(
            *rows,
            (b"merged", inner),
            (b"new", inner),
            (b"opaque", replace(inner, opaque=True, below=(*rows, (b"deep", inner)))),
        ),
    )
    at = made(tmp_path / "layer", layer, source)
    os.setxattr(at, f"{NAMESPACE}.aufsd.fingerprint", b"2 a b")
    exact = {path: time for path, time in times(at).items() if not path.endswith("gone")}
    below = (b"merged", b"opaque", b"opaque/deep")
    assert convert(at, target, lambda way: way.path() in below) == 0
    found = {name: entry for name, entry in snapshot(at).items() if b"gone" in name}
    assert {os.path.dirname(name) for name in found} == {b"", b"merged"}
    assert exact.items() <= times(at).items()
    # what was recorded counted them, and its parents have to stay now
    assert f"{NAMESPACE}.aufsd.fingerprint" not in os.listxattr(at)
    assert marks.is_settled(at, NAMESPACE)
