"""Results for a person: tables and sizes. What a name holds cannot steer the terminal."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence

HEALTH = {"ok": "green", "degraded": "yellow", "failing": "red"}


def line(value: str, *, style: str = "", stderr: bool = False) -> None:
    """One line, in colours if a terminal shows it, and never cut or wrapped by us."""
    stream = sys.stderr if stderr else sys.stdout
    if not stream.isatty():
        # rich is half of the time that a short call takes
        stream.write(f"{text(value)}\n")
        return
    from rich.console import Console

    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    console.print(text(value), style=style, soft_wrap=True)


def text(value: str) -> str:
    """The value with whatever is not printable escaped."""
    return value if value.isprintable() else value.encode("unicode_escape").decode("ascii")


def table(
    names: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    empty: str,
    colours: Mapping[str, str] | None = None,
) -> None:
    """Rows under their names, or a sentence that there are none. `colours`: by the second cell."""
    found = [[text(cell) for cell in row] for row in rows]
    if not found:
        line(empty)
        return
    widths = [max(map(cell_len, column)) for column in zip(names, *found, strict=True)]
    line(_row(names, widths), style="bold")
    # Console.print takes a third of a millisecond for a row, which 10,000 layers make tedious
    plain: list[str] = []
    for row in found:
        if colours:
            line(_row(row, widths), style=colours.get(row[1], ""))
        else:
            plain.append(_row(row, widths))
    if plain:
        sys.stdout.write("\n".join(plain) + "\n")


def cell_len(value: str) -> int:
    """How many cells of a terminal it takes."""
    if value.isascii():
        return len(value)
    from rich.cells import cell_len

    return cell_len(value)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell + " " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)
    )
    return "  ".join(padded).rstrip()


def pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Keys and their values."""
    found = [(text(key), text(value)) for key, value in rows]
    widths = [max(cell_len(key) for key, _ in found), 0]
    for key, value in found:
        line(_row((key, value), widths))


def size(count: int) -> str:
    """Bytes, as a person says them."""
    if count < 1000:
        return f"{count} B"
    amount = float(count)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        amount /= 1000
        if amount < 999.95:
            return f"{amount:.1f} {unit}"
    return f"{amount:.0f} PB"


def moment(since: float) -> str:
    """A time, as the clock on the wall had it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))


def age(since: float, now: float) -> str:
    """How long ago something was, in its largest unit; "-" for a time that is not known."""
    if not since:
        return "-"
    seconds = max(0, int(now - since))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def yes(value: bool) -> str:
    """A truth in a table."""
    return "yes" if value else "no"


def plural(count: int, noun: str) -> str:
    """1 reference, 2 references."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun.removesuffix('y')}{_ending(noun)}"


def _ending(noun: str) -> str:
    return "ies" if noun.endswith("y") else "s"
