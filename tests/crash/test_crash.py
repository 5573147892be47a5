"""kill -9 at every system call, and every call failing: nothing is lost, nothing is half there.

A plain test run takes a sample of the calls, the same one each time, and `make test-all` a larger
one; `make test-crash` breaks the operations at each of their calls, which takes a few minutes.
"""

import json
import os
from contextlib import ExitStack

import pytest

from tests.crash import store
from tests.crash.conftest import Fresh
from tests.crash.restart import RestartSweep
from tests.crash.scenarios import SCENARIOS, SNAPSHOTS, Scenario
from tests.crash.sweep import Outcome, Plan, Point, Sweep

pytestmark = [pytest.mark.service, pytest.mark.crash]

# of each operation, how many of its calls are met by a kill and by an error
KILLS, ERRORS = {"": (4, 2), "more": (12, 6), "all": (10_000, 10_000)}[
    os.environ.get("AUFSD_CRASH", "")
]


def hold(outcome: Outcome) -> None:
    assert outcome.failures == [], "\n".join(outcome.failures)
    # background work may come in another order, and a call of it then has another number; what the
    # next child does to be ready may come too late to be met
    assert outcome.reached >= 0.3 * outcome.points


def cut_off(scenario: Scenario, fresh: Fresh) -> Plan:
    """Break an operation at its points, or a sample of them; all that there are."""
    with ExitStack() as stack:
        sweep = Sweep(scenario, fresh, stack)
        plan = sweep.plan()
        hold(sweep.run(plan, plan.sample(KILLS, ERRORS)))
        return plan


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_cut_off_anywhere_a_layer_is_wholly_there_or_wholly_gone(
    scenario: Scenario, fresh: Fresh
) -> None:
    assert cut_off(scenario, fresh).points


@pytest.mark.btrfs
@pytest.mark.parametrize("scenario", SNAPSHOTS, ids=lambda scenario: scenario.name)
def test_cut_off_anywhere_a_snapshot_is_wholly_there_or_wholly_gone(
    scenario: Scenario, fresh_on_btrfs: Fresh
) -> None:
    plan = cut_off(scenario, fresh_on_btrfs)
    assert any(point.call == "ioctl" for point in plan.points)


def test_a_start_that_is_cut_off_is_made_up_for_by_the_next(fresh: Fresh) -> None:
    sweep = RestartSweep(fresh)
    plan = Plan([], sweep.points())
    hold(sweep.run(plan.sample(KILLS // 2, 0)))


@pytest.mark.parametrize(
    ("scenario", "point", "action", "what"),
    [
        ("create", Point("daemon", "renameat2", 1, "KILL"), "undone", "create"),
        ("remove", Point("daemon", "rename", 2, "KILL"), "finished", "remove"),
        ("apply to a full layer", Point("archive", "unlink", 1, "STOP"), "undone", "apply_diff"),
        ("convert to aufs", Point("archive", "mknodat", 1, "STOP"), "finished", "convert"),
    ],
)
def test_recovery_says_what_it_finished_and_what_it_undid(
    scenario: str, point: Point, action: str, what: str, fresh: Fresh
) -> None:
    (chosen,) = [each for each in SCENARIOS if each.name == scenario]
    with ExitStack() as stack:
        sweep = Sweep(chosen, fresh, stack)
        plan = sweep.plan()
        hold(sweep.run(plan, [point]))
        lines = map(json.loads, sweep.subject.log.splitlines())
        told = [line for line in lines if line["event"] == "recovered"]
        assert [(line["action"], line["what"]) for line in told] == [(action, what)]
        with sweep.subject.client() as client:
            text = client.metrics().text
            assert f'aufsd_recovery_actions_total{{action="{action}"}} 1' in text
            assert list(store.disorder(sweep.subject, client)) == []
