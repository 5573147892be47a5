"""What is a layer id and what is a label: refused before anything on disk is touched."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aufsd.store.ids import is_id, parse_id, parse_label
from aufsd_client.errors import InvalidLabel, InvalidLayerId


@pytest.mark.parametrize("id", ["a", "0", "A" * 200, "sha256.abc_D-e", "f" * 64 + "-init"])
def test_ids_that_are_taken(id: str) -> None:
    assert parse_id(id) == id
    assert is_id(id)


@pytest.mark.parametrize(
    "id",
    [
        *("", ".", "..", "a/b", "/a", "a\n", "a\nb", "\n", "-a", ".wh.a", "_a", "a b", "ä"),
        *("x-removing", "a" * 201, "a" * 300, "a\0b", "a,b", "a:b", "a=b"),
    ],
)
def test_ids_that_are_refused(id: str) -> None:
    assert not is_id(id)
    with pytest.raises(InvalidLayerId):
        parse_id(id)


@given(st.text())
def test_an_id_is_one_name_below_a_directory(text: str) -> None:
    if is_id(text):
        assert "/" not in text
        assert text not in ("", ".", "..")
        assert len(text.encode()) <= 200


@pytest.mark.parametrize("label", ["", "system_u:object_r:container_file_t:s0:c1,c2", "x" * 255])
def test_labels_that_are_taken(label: str) -> None:
    assert parse_label(label) == label


@pytest.mark.parametrize(
    "label", ['a"b', "\ud800", "a\\b", "a\nb", "a\0", "'", "x" * 256, "ä" * 128]
)
def test_labels_that_are_refused(label: str) -> None:
    with pytest.raises(InvalidLabel):
        parse_label(label)
