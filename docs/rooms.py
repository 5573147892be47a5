"""Draws which room of the daemon imports which, from the imports: rooms.py [--count] [CHECKOUT].

A room is a module or a package of `aufsd/`. An arrow from one room to another says that a module of
the first imports one of the second. The picture, rooms.svg beside this script, leaves out an arrow
where a longer way says the same. `--count` draws nothing and prints how many rooms and arrows a
checkout has, and how many arrows run upwards: those of rooms that import each other, by whatever
way round.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import fsum
from pathlib import Path

HERE = Path(__file__).resolve().parent
PICTURE = HERE / "rooms.svg"

Arrow = tuple[str, str]

# pixels
_BOX, _HIGH, _GAP, _STEP, _MARGIN = 104, 32, 24, 76, 12


def modules(checkout: Path) -> dict[str, Path]:
    """The daemon's modules by name; a package itself holds a docstring, or the version."""
    found = {}
    for path in sorted(checkout.glob("aufsd/**/*.py")):
        if path.name != "__init__.py":
            found[".".join(path.relative_to(checkout).with_suffix("").parts)] = path
    return found


def imports(path: Path, known: Iterable[str]) -> Iterator[str]:
    """Modules that a file imports; `from package import module` counts as the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names)


def room(module: str) -> str:
    """The room that a module is in."""
    return module.split(".")[1]


def arrows(checkout: Path) -> set[Arrow]:
    """Which room imports which."""
    known = modules(checkout)
    return {
        (room(module), room(imported))
        for module, path in known.items()
        for imported in imports(path, known)
        if imported.startswith("aufsd.") and room(imported) != room(module)
    }


def below(rooms: Iterable[str], drawn: set[Arrow]) -> dict[str, set[str]]:
    """What each room can be followed down to, by any number of arrows."""
    found = {name: {to for start, to in drawn if start == name} for name in rooms}
    for middle in found:
        for name in found:
            if middle in found[name]:
                found[name] |= found[middle]
    return found


def upwards(checkout: Path) -> set[Arrow]:
    """The arrows that are part of a circle."""
    drawn = arrows(checkout)
    reached = below((name for arrow in drawn for name in arrow), drawn)
    return {(start, to) for start, to in drawn if start in reached[to]}


def _essential(drawn: set[Arrow], reached: dict[str, set[str]]) -> set[Arrow]:
    """The arrows that no longer way stands for."""
    return {
        (start, to)
        for start, to in drawn
        if not any(to in reached[other] for first, other in drawn if first == start)
    }


def _heights(rooms: Iterable[str], drawn: set[Arrow]) -> dict[str, int]:
    """On which floor a room stands: one above the highest that it imports."""
    found = dict.fromkeys(rooms, 0)
    for _ in found:
        for start, to in drawn:
            found[start] = max(found[start], found[to] + 1)
    return found


def _ways(drawn: set[Arrow], heights: dict[str, int]) -> dict[Arrow, list[str]]:
    """What each arrow goes by: its rooms, and a gap on every floor in between."""
    return {
        (start, to): [
            start,
            *(f"{start} {to} {height}" for height in range(heights[start] - 1, heights[to], -1)),
            to,
        ]
        for start, to in sorted(drawn)
    }


def _floors(heights: dict[str, int], ways: dict[Arrow, list[str]]) -> list[list[str]]:
    """Rooms and gaps of each floor from the top, each near the middle of what it is joined to."""
    steps = {step for way in ways.values() for step in pairwise(way)}
    places = dict(heights)
    for way in ways.values():
        places |= {gap: heights[way[0]] - at for at, gap in enumerate(way[1:-1], 1)}
    floors = [
        sorted(name for name in places if places[name] == height)
        for height in range(max(heights.values()), -1, -1)
    ]
    for number in range(8):
        for floor in floors if number % 2 else floors[::-1]:
            at = {name: (i + 1) / (len(row) + 1) for row in floors for i, name in enumerate(row)}
            middle = {}
            for name in floor:
                joined = [at[b if a == name else a] for a, b in steps if name in (a, b)]
                # fsum: the order of a set must not decide between rooms that are level
                middle[name] = fsum(joined) / max(1, len(joined))
            floor.sort(key=lambda name: (middle[name], name))
    return floors


def _corners(floors: list[list[str]], wide: int) -> dict[str, tuple[int, int]]:
    """Where the middle of the upper edge of each room, and of each gap, is drawn."""
    found = {}
    for down, floor in enumerate(floors):
        space = (wide - 2 * _MARGIN - sum(map(_width, floor))) / (len(floor) + 1)
        x = _MARGIN + space
        for name in floor:
            found[name] = (round(x + _width(name) / 2), _MARGIN + down * _STEP)
            x += _width(name) + space
    return found


def _width(name: str) -> int:
    return 6 if " " in name else _BOX


def picture(checkout: Path) -> str:
    """The rooms and their arrows as SVG."""
    found = {room(module) for module in modules(checkout)}
    drawn = arrows(checkout)
    shown = _essential(drawn, below(found, drawn))
    heights = _heights(found, drawn)
    ways = _ways(shown, heights)
    floors = _floors(heights, ways)
    wide = max(sum(_width(name) + _GAP for name in floor) for floor in floors) + 2 * _MARGIN
    high = len(floors) * _STEP - (_STEP - _HIGH) + 2 * _MARGIN
    corners = _corners(floors, wide)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" '
        f'width="{wide}" height="{high}" font-family="sans-serif" font-size="13">',
        "<title>Which room of aufsd imports which; made by docs/rooms.py</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#557"/></marker></defs>',
        f'<rect width="{wide}" height="{high}" fill="#fff"/>',
    ]
    for way in ways.values():
        path = "M{} {}".format(*corners[way[0]])
        for start, to in pairwise(way):
            (x, y), (to_x, to_y) = corners[start], corners[to]
            y += _HIGH
            bend = (to_y - y) // 2
            path += f"L{x} {y}C{x} {y + bend} {to_x} {to_y - bend} {to_x} {to_y}"
        lines.append(f'<path d="{path}" fill="none" stroke="#557" marker-end="url(#tip)"/>')
    for name in sorted(heights):
        x, y = corners[name]
        package = (checkout / "aufsd" / name).is_dir()
        lines += [
            f'<rect x="{x - _BOX // 2}" y="{y}" width="{_BOX}" height="{_HIGH}" rx="5" '
            f'fill="{"#dbe7f7" if package else "#eef3fb"}" stroke="#557"/>',
            f'<text x="{x}" y="{y + 21}" text-anchor="middle">'
            f"{name}{'/' if package else '.py'}</text>",
        ]
    return "\n".join((*lines, "</svg>")) + "\n"


def count(checkout: Path) -> str:
    """Rooms, arrows and arrows upwards of a checkout, in a line."""
    rooms = {room(module) for module in modules(checkout)}
    up = sorted(f"{start} -> {to}" for start, to in upwards(checkout))
    said = f"{len(rooms)} rooms, {len(arrows(checkout))} arrows, {len(up)} of them upwards"
    return f"{said}: {', '.join(up)}" if up else said


def main() -> None:
    """Draw this checkout, or count one."""
    words = [word for word in sys.argv[1:] if word != "--count"]
    checkout = Path(words[0]) if words else HERE.parent
    if "--count" in sys.argv:
        print(count(checkout))
    else:
        PICTURE.write_text(picture(checkout))


if __name__ == "__main__":
    main()
