"""A connection's states, and what moves it from one to the next. Pure; the table is all there is.

What else is known of a connection is derived: it is full when its calls or answers say so, and its
peer is gone when its outbox is closed.
"""

from enum import Enum


class State(Enum):
    """What is done with a connection."""

    READING = "it is read, and lines are begun"
    PAUSED = "as many calls wait as may: it is not read until one has ended"
    ENDED = "its peer sends no more; what has arrived is begun"
    REFUSED = "its peer was told what is wrong; what it still sends is thrown away"
    FINISHED = "nothing more is begun; its calls end and are answered"
    DROPPED = "nothing more goes in or out; its calls end"
    CLOSED = "its socket is closed"


class Event(Enum):
    """What happens to it."""

    FULL = "as many calls wait as may"
    ROOM = "another call may be begun"
    END = "its peer sends no more"
    REFUSE = "what it sends is no use, and it was told so"
    DONE = "all that is to be begun or thrown away has been"
    DROP = "its peer misbehaves, or the fault is ours"
    IDLE = "none of its calls is left, and no answer"


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
    """The state that follows; the same where the event changes nothing."""
    return _NEXT[state].get(event, state)
