"""Every errno of every call of what the daemon does all day: it goes on, tells, and tries again.

A plain test run takes a sample, the same one each time, and `make test-all` a larger one;
`make test-crash` takes all errnos of all calls.
"""

import os
import random
from contextlib import ExitStack

import pytest

from tests.crash.conftest import Fresh
from tests.crash.faults import ERRNOS, FaultSweep

pytestmark = [pytest.mark.service, pytest.mark.crash]

TIER = os.environ.get("AUFSD_CRASH", "")
# numbers of each call, and points in all
NUMBERS, MOST = {"": (1, 5), "more": (1, 25), "all": (6, 10_000)}[TIER]
# by themselves, so that several processes share the work
CALLS = [(call,) for call in ERRNOS] if TIER == "all" else [tuple(ERRNOS)]


@pytest.mark.parametrize("calls", CALLS, ids=lambda calls: calls[0] if len(calls) == 1 else "any")
def test_whatever_call_fails_it_answers_counts_right_and_does_it_again(
    calls: tuple[str, ...], fresh: Fresh
) -> None:
    with ExitStack() as stack:
        sweep = FaultSweep(fresh, stack)
        points = sweep.points(calls, NUMBERS)
        outcome = sweep.run(random.Random(5).sample(points, min(MOST, len(points))))
    assert outcome.failures == [], "\n".join(outcome.failures)
    # a later call of a name is not always made
    assert outcome.reached >= 0.3 * outcome.points
