"""The graph of layers: how it is drawn, what a removal gives back, what may go."""

import random

import pytest

from aufsd_client.graph import Branch, Graph, Space, Wanted, drawn, graph, prunable, spaces, under
from aufsd_client.results import LayerRow, Usage


def row(
    id: str, parent: str = "", *, references: int = 0, created: float = 1.0, sealed: bool = False
) -> LayerRow:
    return LayerRow(id, parent, 1, references, references > 0, created, sealed)


def lines(of: Graph) -> list[str]:
    return [branch.rails + branch.id for branch in drawn(of)]


FOREST = graph(
    [
        row("base"),
        row("one", "base"),
        row("two", "one"),
        row("work", "two"),
        row("try", "two", references=1),
        row("side", "base"),
        row("deep", "side"),
        row("alone", created=0.0),
    ]
)


def test_a_chain_stays_in_its_column_and_siblings_branch_off() -> None:
    assert lines(FOREST) == [
        "alone",
        "base",
        "├─ one",
        "│  │ two",
        "│  ├─ try",
        "│  └─ work",
        "└─ side",
        "   └─ deep",
    ]


def test_it_is_drawn_without_a_character_that_ascii_lacks() -> None:
    plain = [branch.rails + branch.id for branch in drawn(FOREST, ascii_only=True)]
    assert plain[2:6] == ["|- one", "|  | two", "|  |- try", "|  `- work"]


def test_a_part_begins_at_its_layer() -> None:
    assert lines(under(FOREST, "one")) == ["one", "│ two", "├─ try", "└─ work"]
    with pytest.raises(KeyError):
        under(FOREST, "none")


def test_a_layer_whose_parent_is_not_there_is_a_root() -> None:
    assert lines(graph([row("a", "gone"), row("b", "a")])) == ["a", "└─ b"]


def test_rows_that_go_in_a_circle_are_all_drawn_once() -> None:
    found = graph([row("a", "c"), row("b", "a"), row("c", "b"), row("me", "me"), row("x")])
    assert sorted(branch.id for branch in drawn(found)) == ["a", "b", "c", "me", "x"]
    assert lines(found) == ["a", "│ b", "└─ c", "me", "x"]


def test_a_chain_of_any_length_is_drawn_and_measured() -> None:
    count = 20_000
    rows = [row(f"l{number:05}", f"l{number - 1:05}") for number in range(count)]
    found = graph(rows)
    assert len(lines(found)) == count
    usages = {each.id: Usage(2, 1) for each in rows}
    assert spaces(found, usages)["l19999"] == Space(2, 2 * count, 2 * count)
    assert len(prunable(found, Wanted(parents=True))) == count


def test_a_removal_gives_back_what_no_other_layer_stands_on() -> None:
    usages = {id: Usage(10**index, 1) for index, id in enumerate(FOREST.rows)}
    own = {id: usage.size for id, usage in usages.items()}
    found = spaces(FOREST, usages)
    chain = own["base"] + own["side"] + own["deep"]
    assert found["deep"] == Space(own["deep"], chain, own["side"] + own["deep"])
    assert found["work"].frees == own["work"]
    assert found["two"].frees == 0
    assert found["alone"] == Space(own["alone"], own["alone"], own["alone"])


def test_what_is_freed_is_what_the_rest_no_longer_holds() -> None:
    """Against plain sets, for random forests."""
    chance = random.Random(7)
    for _ in range(200):
        rows: list[LayerRow] = []
        for number in range(chance.randrange(1, 12)):
            rows.append(row(f"l{number}", chance.choice(["", *(each.id for each in rows)])))
        usages = {each.id: Usage(chance.randrange(1, 99), 1) for each in rows}
        parents = {each.id: each.parent for each in rows}

        def chain(id: str, parents: dict[str, str] = parents) -> set[str]:
            found = set()
            while id:
                found.add(id)
                id = parents[id]
            return found

        for id, space in spaces(graph(rows), usages).items():
            others = [each for each in parents if each != id and each not in chain(id)]
            needed = set().union(*(chain(other) for other in others))
            leaf = id not in parents.values()
            alone = chain(id) - needed if leaf else set()
            assert space.frees == sum(usages[each].size for each in alone)
            assert space.chain == sum(usages[each].size for each in chain(id))


def test_only_leaves_that_nobody_uses_are_pruned() -> None:
    assert prunable(FOREST, Wanted()) == ["alone", "deep", "work"]
    assert prunable(FOREST, Wanted(prefix="d")) == ["deep"]


def test_the_age_of_a_layer_that_has_none_is_not_enough() -> None:
    assert prunable(FOREST, Wanted(before=2.0)) == ["deep", "work"]
    assert prunable(FOREST, Wanted(before=1.0)) == []


def test_parents_go_after_what_stood_on_them_and_stay_below_what_stays() -> None:
    assert prunable(FOREST, Wanted(parents=True)) == ["alone", "deep", "work", "side"]


def test_sealed_layers_go_only_if_they_are_named() -> None:
    found = graph([row("image", sealed=True), row("top", "image")])
    assert prunable(found, Wanted(parents=True)) == ["top"]
    assert prunable(found, Wanted(parents=True, sealed=True)) == ["top", "image"]
    assert Branch("top", "└─ ") in drawn(found)
