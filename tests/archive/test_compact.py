"""Many rows and names in little more than their bytes."""

import tracemalloc
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from aufsd.archive import compact
from aufsd.archive.compact import Ordered, Seen, once

NAMES = st.binary(min_size=1, max_size=6).filter(lambda name: b"/" not in name)


@settings(deadline=None)
@given(st.lists(NAMES))
def test_rows_come_in_the_order_of_their_bytes(rows: list[bytes]) -> None:
    found = Ordered()
    for row in rows:
        found.add(row)
    assert list(found) == sorted(rows)
    assert list(once(found)) == sorted(set(rows))


def test_rows_of_several_pieces_come_in_order() -> None:
    rows = [b"%064d" % (number * 7919 % 50_000) for number in range(50_000)]
    found = Ordered()
    for row in rows:
        found.add(row)
    assert list(found) == sorted(rows)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), NAMES)), st.integers(0, 5))
def test_names_are_seen_as_in_a_set(steps: list[tuple[bool, bytes]], few: int) -> None:
    found: Seen = Seen()
    model: set[bytes] = set()
    before, compact._FEW = compact._FEW, few  # type: ignore[misc]
    try:
        for add, name in steps:
            assert (name in found) is (name in model)
            if add:
                assert found.add(name) is (name not in model)
                model.add(name)
            else:
                found.discard(name)
                model.discard(name)
    finally:
        compact._FEW = before  # type: ignore[misc]


def test_two_hundred_thousand_of_either_take_little_more_than_their_bytes() -> None:
    def ordered() -> None:
        rows = Ordered()
        for number in range(200_000):
            rows.add(b"name-%d" % (number * 7919 % 200_000))
        assert sum(1 for _ in rows) == 200_000

    def seen() -> None:
        names = Seen()
        for number in range(200_000):
            assert names.add(b"name-%d" % number)
            assert not names.add(b"name-%d" % number)

    # a list of them takes 11 MB, a set 19
    assert peak(ordered) < 9_000_000
    assert peak(seen) < 5_000_000


def peak(work: Callable[[], None]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
