"""Run a coroutine up to its first wait, and the rest of it in a task."""

import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import Any


def first_step(coroutine: Coroutine[Any, Any, None]) -> Awaitable[None] | None:
    """Run `coroutine` until it would give up the event loop; the rest of it, None if it has ended.

    The task that calls this has to await the rest before anything else: Trio knows by now that it
    is this one that waits. What the coroutine raises is raised.
    """
    try:
        message = coroutine.send(None)
    except StopIteration:
        return None
    return _rest(coroutine, message)


@types.coroutine
def _rest(coroutine: Coroutine[Any, Any, None], message: object) -> Generator[Any, Any, None]:
    # what it yields goes to Trio's runner, and what that sends or throws comes back, as with
    # `yield from` (PEP 380), which can only start with a coroutine that nobody has started
    while True:
        resume: Callable[[], Any]
        try:
            resume = partial(coroutine.send, (yield message))
        except BaseException as error:
            resume = partial(coroutine.throw, error)
        try:
            message = resume()
        except StopIteration:
            return
