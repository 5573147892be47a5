"""Await a coroutine, and be told when it waits for the first time."""

import types
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any


@types.coroutine
def watched(
    coroutine: Coroutine[Any, Any, None], first_wait: Callable[[], object]
) -> Generator[Any, Any, bool]:
    """Await `coroutine`; call `first_wait` just before it gives up the event loop. Whether it did.

    It stays in the caller's task: what it yields goes to Trio's runner, and what that sends or
    throws comes back, as with `yield from` (PEP 380), which cannot be told of the first yield.
    """
    try:
        message = coroutine.send(None)
    except StopIteration:
        return False
    first_wait()
    while True:
        resume: Callable[[], Any]
        try:
            resume = partial(coroutine.send, (yield message))
        except BaseException as error:
            resume = partial(coroutine.throw, error)
        try:
            message = resume()
        except StopIteration:
            return True
