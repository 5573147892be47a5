"""The layers of a store as a graph: what stands on what, and what a removal gives back.

Pure: it works on the rows of `list` and on sizes that somebody asked for. Nothing here recurses: a
chain may be as long as the daemon lets it be.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from aufsd_client.results import LayerRow, Usage


@dataclass(frozen=True, slots=True)
class Graph:
    """`children` has every layer, those nothing stands on too; ids are in order everywhere."""

    rows: dict[str, LayerRow]
    children: dict[str, list[str]]
    roots: list[str]


@dataclass(frozen=True, slots=True)
class Branch:
    """A line of a drawn tree: `rails` are what stands before the id."""

    id: str
    rails: str


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes of a layer.

    `own`: its own content. `chain`: that and its parents'. `frees`: what goes when the layer is
    removed together with those of its parents that nothing else stands on; 0 if layers stand on it.
    """

    own: int
    chain: int
    frees: int


def graph(rows: Iterable[LayerRow]) -> Graph:
    """The graph. A layer whose parent is not among the rows is a root.

    The pages of a list are not of one moment: rows whose parents lead in a circle can come out of
    that, and the first of a circle is a root too.
    """
    found = {row.id: row for row in sorted(rows, key=lambda row: row.id)}
    children: dict[str, list[str]] = {id: [] for id in found}
    roots: list[str] = []
    for id, row in found.items():
        if row.parent in found:
            children[row.parent].append(id)
        else:
            roots.append(id)
    reached = set(_beneath(children, roots))
    for id, row in found.items():
        if id not in reached:
            children[row.parent].remove(id)
            roots.append(id)
            reached.update(_beneath(children, [id]))
    return Graph(found, children, sorted(roots))


def _beneath(children: Mapping[str, list[str]], tops: Iterable[str]) -> list[str]:
    """The tops and all that stands on them."""
    found = list(tops)
    for id in found:
        found.extend(children[id])
    return found


def under(of: Graph, id: str) -> Graph:
    """The part of a graph that begins at a layer. Raises KeyError if it is not there."""
    if id not in of.rows:
        raise KeyError(id)
    return graph(of.rows[each] for each in _beneath(of.children, [id]))


def drawn(of: Graph, *, ascii_only: bool = False) -> Iterator[Branch]:
    """Its lines from the roots on, a layer before those that stand on it.

    A layer that alone stands on its parent is drawn in the parent's column: long chains are common,
    and would soon leave a terminal on the right.
    """
    tee, corner, pipe = ("|- ", "`- ", "|  ") if ascii_only else ("├─ ", "└─ ", "│  ")
    # (id, what stands before the id, what stands before those on it)
    waiting = [(id, "", "") for id in reversed(of.roots)]
    while waiting:
        id, rails, column = waiting.pop()
        yield Branch(id, rails)
        children = of.children[id]
        if len(children) == 1 and of.children[children[0]]:
            waiting.append((children[0], column + pipe[:2], column))
            continue
        for child in reversed(children):
            last = child == children[-1]
            below = column + ("   " if last else pipe)
            waiting.append((child, column + (corner if last else tee), below))


def spaces(of: Graph, usages: Mapping[str, Usage]) -> dict[str, Space]:
    """What each layer takes up. A layer without a usage counts as 0."""
    chain: dict[str, int] = {}
    alone: dict[str, int] = {}
    found: dict[str, Space] = {}
    for branch in drawn(of):
        id = branch.id
        parent = of.rows[id].parent
        own = usages[id].size if id in usages else 0
        chain[id] = own + chain.get(parent, 0)
        only = len(of.children.get(parent, ())) == 1
        alone[id] = own + (alone.get(parent, 0) if only else 0)
        found[id] = Space(own, chain[id], 0 if of.children[id] else alone[id])
    return found


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which layers `prunable` gives.

    `before`: those made before this time, None for those of any age. `sealed`: those that were
    sealed too. `parents`: then those too on which nothing stands any more.
    """

    before: float | None = None
    prefix: str = ""
    sealed: bool = False
    parents: bool = False


def prunable(of: Graph, wanted: Wanted) -> list[str]:
    """The layers that nothing stands on and nobody references, in the order to remove them in.

    A layer whose age is not known is not older than anything.
    """
    left = {id: len(children) for id, children in of.children.items()}
    waiting = [id for id, count in left.items() if not count]
    found: list[str] = []
    for id in waiting:
        row = of.rows[id]
        if not _goes(row, wanted):
            continue
        found.append(id)
        if row.parent in left:
            left[row.parent] -= 1
            if wanted.parents and not left[row.parent]:
                waiting.append(row.parent)
    return found


def _goes(row: LayerRow, wanted: Wanted) -> bool:
    if row.references or row.mounted or (row.sealed and not wanted.sealed):
        return False
    if wanted.before is not None and not 0 < row.created < wanted.before:
        return False
    return row.id.startswith(wanted.prefix)
