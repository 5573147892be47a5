"""Progress and warnings, on a clock of our own."""

import pytest

from aufsd.archive.meter import Meter, shown


def test_reports_come_no_more_often_than_four_times_a_second() -> None:
    now = 10.0
    told: list[tuple[int, int]] = []
    meter = Meter(lambda size, entries: told.append((size, entries)), lambda: now)
    for _ in range(255):
        now += 1 / 256
        meter.bytes += 1
        meter.tick()
    assert told == [(64, 0), (128, 0), (192, 0)]


def test_the_first_hundred_warnings_are_kept() -> None:
    meter = Meter(lambda size, entries: None)
    for number in range(100):
        meter.warn(str(number))
    assert meter.warnings() == [str(number) for number in range(100)]
    meter.warn("one more")
    assert meter.warnings()[100:] == ["and 1 more"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"plain", "plain"),
        ("Ünï".encode(), "Ünï"),
        (b"\xff\n\x1b[0m", "\\xff\\n\\x1b[0m"),
        (b"x" * 1000, "x" * 150 + "..." + "x" * 150),
    ],
)
def test_a_name_is_shown_so_that_a_terminal_survives_it(name: bytes, text: str) -> None:
    assert shown(name) == text
