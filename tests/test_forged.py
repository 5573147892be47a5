"""Marks that somebody else may have written are what aufsd writes, or they say nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aufsd.digits import number
from aufsd.kernel import probe
from aufsd.store import content, creation, origin, seals
from aufsd.store.dialect import XattrNamespace
from aufsd.store.ids import LayerId
from aufsd.store.opening import open_store
from aufsd.union import conversion, exclusive

pytestmark = pytest.mark.mounts

NAMESPACE: XattrNamespace = "user" if probe.in_user_namespace() else "trusted"
NO_NUMBERS = [
    *("", "-1", "+1", "1_0", " 1", "1\n", "0x1", "1.0", "nan", "\0"),
    *("²", "\u0663", "\uff11", "9" * 1000, str(1 << 64)),
]
LAST = (1 << 63) - 1


def forge(path: Path, mark: str, text: str) -> None:
    os.setxattr(path, f"{NAMESPACE}.aufsd.{mark}", text.encode())


@contextmanager
def descriptor(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_no_number_is_read_where_none_stands(text: str, tmp_path: Path) -> None:
    assert number(text, LAST) is None
    assert number(text.encode(), LAST) is None
    forge(tmp_path, "size", text)
    assert content.limit_of(str(tmp_path), NAMESPACE) == 0
    for words in ((text, "1"), ("1", text)):
        forge(tmp_path, "origin", " ".join(("ab" * 16, *words)))
        assert origin.read_origin(tmp_path, NAMESPACE) is None


@pytest.mark.parametrize("uuid", ["", "ab" * 15, "ab" * 17, "AB" * 16, "é" * 32])
def test_no_subvolume_is_read_where_none_stands(uuid: str, tmp_path: Path) -> None:
    forge(tmp_path, "origin", f"{uuid} 1 1")
    assert origin.read_origin(tmp_path, NAMESPACE) is None


@pytest.mark.parametrize("text", [*NO_NUMBERS, "1 1 1", "1  1", f"{1 << 63} 1", "- 1"])
def test_no_times_are_read_where_none_stand(text: str, tmp_path: Path) -> None:
    """Else a conversion that a crash cut off would end every start, or set times of its own."""
    forge(tmp_path, "times", text)
    with descriptor(tmp_path) as fd:
        assert conversion.noted_times(fd, NAMESPACE) is None
        forge(tmp_path, "times", f"{-LAST} {LAST}")
        assert conversion.noted_times(fd, NAMESPACE) == (-LAST, LAST)
        os.utime(fd, ns=(-LAST, LAST))


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_a_sealed_layer_takes_up_is_counted_where_no_count_stands(
    text: str, tmp_path: Path
) -> None:
    id = LayerId("layer")
    store = open_store(str(tmp_path), adopt=False, xattr_namespace=NAMESPACE)
    try:
        store.register(id, None)
        creation.create_on_disk(store, id, (), {})
        seals.seal(store, id, seals.Usage(LAST, 1))
        assert seals.read_usage(store, id) == seals.Usage(LAST, 1)
        for words in ((text, "1"), ("1", text)):
            forge(tmp_path / "diff/layer", "usage", " ".join((*words, id)))
            assert seals.read_usage(store, id) is None
        forge(tmp_path / "diff/layer", "usage", "1 1 other")
        assert seals.read_usage(store, id) is None
    finally:
        store.close()


@pytest.mark.parametrize(
    "text",
    [
        *(f"overlay {text}" for text in NO_NUMBERS if "\0" not in text),
        *("overlay", "overlay 1 1", "aufs", "aufs si_1", "aufs ../../etc 1 1", "aufs si_1 1 ²"),
    ],
)
def test_no_union_is_noted_where_no_note_stands(text: str, tmp_path: Path) -> None:
    (tmp_path / "union").symlink_to(text or "nothing")
    assert exclusive.noted_device(str(tmp_path)) is None
    exclusive.note(str(tmp_path), "aufs", "si_fe", 7, 9)
    assert exclusive.noted_device(str(tmp_path)) == 9
    exclusive.note(str(tmp_path), "overlay", 8)
    assert exclusive.noted_device(str(tmp_path)) == 8


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_no_note_is_none(kind: str, tmp_path: Path) -> None:
    at = tmp_path / "union"
    at.touch() if kind == "file" else at.mkdir()
    assert exclusive.noted_device(str(tmp_path)) is None
