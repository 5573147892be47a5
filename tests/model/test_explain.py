"""The search itself: what it explains, and what it does not."""

from math import inf

from tests.model.explain import Event, explain, shortest, with_neighbours
from tests.model.world import DONE, UNKNOWN, Call, State


def event(call: Call, answer: object, began: float, ended: float) -> Event:
    return Event(call, answer, began, ended)


BASE = event(Call("create", "a"), DONE, 0, 1)
GET, GOT = Call("get", "a"), ("got", 1, False, False, True)


def test_calls_one_after_the_other_are_explained_in_their_order_only() -> None:
    late = event(Call("exists", "a"), False, 2, 3)
    assert explain(State(), [BASE, event(Call("exists", "a"), True, 2, 3)]) is not None
    assert explain(State(), [BASE, late]) is None


def test_calls_that_overlap_are_explained_in_any_order() -> None:
    early = event(Call("exists", "a"), False, 0.5, 3)
    assert explain(State(), [BASE, early]) is not None


def test_what_may_not_have_been_done_is_left_out_where_it_can_be() -> None:
    cut = event(Call("apply_diff", "a", tar=(("f", 2),)), UNKNOWN, 2, inf)
    death = event(Call("death", "a", hold="pid:7"), DONE, 3, inf)
    found = explain(State(), [BASE, cut, event(Call("diff", "a"), frozenset(), 4, 5), death])
    assert found is not None
    assert found.layers[0][1].own == frozenset()


def test_two_that_overlap_cannot_both_be_first() -> None:
    first, second = event(GET, GOT, 2, 4), event(GET, GOT, 3, 5)
    assert explain(State(), [BASE, first]) is not None
    assert explain(State(), [BASE, first, second]) is None


def test_a_death_that_would_change_nothing_yet_may_come_later() -> None:
    taken = event(Call("get", "a", hold="pid:7"), GOT, 2, 4)
    death = event(Call("death", "a", hold="pid:7"), DONE, 3, inf)
    listed = event(Call("list"), frozenset({("a", ("", 1, 0, False))}), 5, 6)
    assert explain(State(), [BASE, taken, death, listed]) is not None


def test_a_call_that_was_cut_off_may_come_at_any_time_or_never() -> None:
    cut = event(Call("remove", "a"), UNKNOWN, 2, inf)
    for seen in (True, False):
        assert explain(State(), [BASE, cut, event(Call("exists", "a"), seen, 8, 9)]) is not None
    back = [event(Call("exists", "a"), False, 8, 9), event(Call("exists", "a"), True, 10, 11)]
    assert explain(State(), [BASE, cut, *back]) is None


def test_a_refusal_because_the_layer_is_read_needs_a_reader() -> None:
    refused = event(Call("apply_diff", "a"), "LayerInUse", 2, 4)
    reader = event(Call("diff", "a"), frozenset(), 3, 5)
    assert explain(State(), with_neighbours([BASE, refused])) is None
    assert explain(State(), with_neighbours([BASE, refused, reader])) is not None


def test_the_shortest_window_leaves_out_what_does_not_matter() -> None:
    wrong = event(Call("exists", "a"), False, 6, 7)
    others = [event(Call("exists", "a"), True, at, at + 0.5) for at in (2, 3, 8)]
    assert shortest(State(), [BASE, *others, wrong]) == [BASE, wrong]
