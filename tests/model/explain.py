"""Whether some order of calls explains what each of them answered, each made in one go.

Calls that overlap may have been made in any order; one that was answered before another began came
first. The search is that of Wing and Gong, with Lowe's memory of where it has been. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from tests.model.world import UNKNOWN, Answer, Beside, Call, State, fits, outcomes

# places that the search may look at: one that needs more has hundreds of calls at a time
_MOST = 3_000_000
_READS = ("diff", "diff_size", "changes")
_TURNS = ("get", "put", "remove", "take_down", "death", "restart", "outside")
_WRITES = ("link", "unlink")
# whether these changed anything their answer does not tell
_UNTOLD = ("death", "restart", "take_down", "let_go")


ALONE = Beside()


@dataclass(frozen=True)
class Event:
    """A call with its answer. `began` and `ended` are seconds; `ended` is inf of one cut off."""

    call: Call
    answer: Answer
    began: float
    ended: float
    client: int = 0
    beside: Beside = ALONE

    @property
    def optional(self) -> bool:
        return self.answer == UNKNOWN

    def __str__(self) -> str:
        call = " ".join(f"{key}={value}" for key, value in self.call._asdict().items() if value)
        said = sorted(self.answer, key=str) if isinstance(self.answer, frozenset) else self.answer
        return f"{self.began:.6f} {self.ended:.6f} client {self.client}: {call} -> {said}"


class TooMany(Exception):
    """The search was given up."""


def with_neighbours(history: Sequence[Event]) -> list[Event]:
    """The history with what overlaps each call noted on it."""
    return [replace(event, beside=_beside(event, history)) for event in history]


def _beside(event: Event, history: Sequence[Event]) -> Beside:
    others = [each for each in history if each.began <= event.ended and event.began <= each.ended]
    calls = [each.call for each in others if each is not event]
    writes = [call.name for call in calls if call.method in _WRITES]
    return Beside(
        readers=tuple((call.id, call.parent) for call in calls if call.method in _READS),
        turning=frozenset(call.id for call in calls if call.method in _TURNS),
        torn=frozenset(writes if len(writes) > 1 else ()),
        full=any(call.method == "full" for call in calls),
        removed=any(call.method == "remove" for call in calls),
        died=frozenset(call.hold for call in calls if call.method == "death"),
        killed=event.optional and any(call.method == "restart" for call in calls),
    )


def explain(start: State, history: Sequence[Event]) -> State | None:
    """A state that the history may have led to; None if no order of the calls explains it."""
    events = sorted(
        (event for event in history if event.call.method != "full"),
        # what may not have been done comes last, so that it is left out where it can be
        key=lambda each: (each.optional, each.ended),
    )
    needed = sum(1 << at for at, event in enumerate(events) if not event.optional)
    # those that have to come before each, and those that cannot
    before = [
        sum(1 << at for at, other in enumerate(events) if other.ended < event.began) & needed
        for event in events
    ]
    after = [
        sum(1 << at for at, other in enumerate(events) if event.ended < other.began)
        for event in events
    ]
    # those that may be left out, and that cannot come after it
    passed = [
        [at for at, other in enumerate(events) if other.optional and other.ended < event.began]
        for event in events
    ]
    pending = [(0, start)]
    seen = {(0, start)}
    while pending:
        done, now = pending.pop()
        if done & needed == needed:
            return now
        if len(seen) > _MOST:
            raise TooMany
        found = []
        for at, event in enumerate(events):
            if done >> at & 1 or before[at] & ~done or after[at] & done:
                continue
            then = {
                state
                for expected, state in outcomes(now, event.call, event.beside)
                if event.optional or fits(expected, event.answer)
            }
            places = [(done | 1 << at, each) for each in then]
            lost = any(not (done >> other & 1 or after[other] & done) for other in passed[at])
            told = event.call.method not in _UNTOLD
            if then == {now} and told and not event.optional and not lost:
                # it changes nothing and may be next: if there is an order, there is one from here
                found = places
                break
            found += places
        for place in reversed(found):
            if place not in seen:
                seen.add(place)
                pending.append(place)
    return None


def shortest(start: State, history: Sequence[Event]) -> list[Event]:
    """As few calls of an unexplained history as are not explained either.

    First the earliest moment at which it cannot be explained any more, then without the questions
    that do not matter. Calls that were under way at that moment count as not answered yet.
    """
    # one after the other: to explain a beginning is quick, and to find that it has none is not
    moments = [*sorted(event.ended for event in history if event.ended < inf), inf]
    last = next(each for each in moments if explain(start, _until(history, each)) is None)
    found = _until(history, last)
    for event in sorted(found, key=lambda each: each.began):
        # the last answer is the one that cannot be explained
        if _asks_only(event) and event.ended != last:
            without = [each for each in found if each is not event]
            if explain(start, without) is None:
                found = without
    return sorted(found, key=lambda each: each.began)


def _until(history: Sequence[Event], moment: float) -> list[Event]:
    return [
        event if event.ended <= moment else replace(event, answer=UNKNOWN, ended=inf)
        for event in history
        if event.began <= moment
    ]


def _asks_only(event: Event) -> bool:
    """Whether the call changed nothing, by its own answer."""
    asks = (
        *_READS,
        "exists",
        "list",
        "mounts",
        "get_metadata",
        "check",
        "kernel",
        "content",
        "look",
        "read",
    )
    refused = isinstance(event.answer, str) and event.answer[:1].isupper()
    return event.call.method in asks or refused
