"""The states of a connection, and the events that change them. Pure.

`_NEXT` is the whole state machine. Whether a connection has room for another call is derived from
its calls and answers (`Runner.has_room`), and whether its peer is gone from its closed outbox.
"""

from enum import Enum


class State(Enum):
    """What is done with a connection."""

    READING = "it is read, and its lines are begun"
    PAUSED = "it has no room for another call, and is not read until it has"
    ENDED = "its peer sends no more; the lines that have arrived are begun"
    REFUSED = "its peer was told why; what it still sends is thrown away"
    FINISHED = "nothing more is begun; its calls end and are answered"
    DROPPED = "nothing more goes in or out; its calls end"
    CLOSED = "its socket is closed"


class Event(Enum):
    """What happens to it."""

    FULL = "it has no room for another call"
    ROOM = "it has room again"
    END = "its peer sends no more"
    REFUSE = "its peer was told that nothing more is carried out"
    DONE = "nothing is left to begin or to throw away"
    DROP = "its peer misbehaves, or aufsd has a fault"
    IDLE = "no call and no answer is left"


_NEXT = {
    State.READING: {
        Event.FULL: State.PAUSED,
        Event.END: State.ENDED,
        Event.REFUSE: State.REFUSED,
        Event.DROP: State.DROPPED,
    },
    State.PAUSED: {Event.ROOM: State.READING, Event.DROP: State.DROPPED},
    State.ENDED: {
        Event.DONE: State.FINISHED,
        Event.REFUSE: State.FINISHED,
        Event.DROP: State.DROPPED,
    },
    State.REFUSED: {
        Event.END: State.FINISHED,
        Event.DONE: State.FINISHED,
        Event.DROP: State.DROPPED,
    },
    State.FINISHED: {Event.IDLE: State.CLOSED, Event.DROP: State.DROPPED},
    State.DROPPED: {Event.IDLE: State.CLOSED},
    State.CLOSED: {},
}


def after(state: State, event: Event) -> State:
    """The next state. An event that the table does not have for a state changes nothing."""
    return _NEXT[state].get(event, state)
