"""Breaks an operation at one call after another, and says what did not hold.

Which calls there are is counted first, on the same operation undisturbed. An operation is cut off
in three ways: the daemon is killed on its way into a call; its archive child is, and the daemon
lives; the child is stopped right after a call, and then the daemon is killed. And a call may fail.
"""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from aufsd_client import Client
from aufsd_client.errors import AufsdError
from aufsd_client.wire import ConnectionLost, DaemonUnreachable
from tests.crash import store
from tests.crash.scenarios import Scenario, clear, populate
from tests.crash.store import Seen
from tests.crash.strace import CALLS, OPENING, Trace, traced
from tests.crash.subject import Subject
from tests.daemon import archive_processes

KILLS = ("KILL", "STOP")
Where = Literal["daemon", "archive"]


@dataclass(frozen=True)
class Point:
    """One call, the n-th of its name, and what becomes of it."""

    where: Where
    call: str
    number: int
    fault: str

    def __str__(self) -> str:
        return f"{self.fault} at {self.call} {self.number} of the {self.where}"

    @property
    def expressions(self) -> tuple[str, str]:
        """For strace(1), "-e"."""
        kind = "signal" if self.fault in KILLS else "error"
        return f"trace={self.call}", f"inject={self.call}:{kind}={self.fault}:when={self.number}"


@dataclass
class Outcome:
    """What became of the points: how many were reached, and the sentences on those that failed."""

    points: int = 0
    reached: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """What the layer may look like, first to last, and where the operation can be broken."""

    allowed: list[Seen | None]
    points: list[Point]

    def sample(self, kills: int, errors: int) -> list[Point]:
        """At most so many of the points, the same ones each time."""
        chosen = random.Random(5)
        cut = [point for point in self.points if point.fault in KILLS]
        failing = [point for point in self.points if point.fault not in KILLS]
        return [
            *chosen.sample(cut, min(kills, len(cut))),
            *chosen.sample(failing, min(errors, len(failing))),
        ]


@dataclass
class Sweep:
    """One scenario, over one subject until something fails, then over a fresh one."""

    scenario: Scenario
    fresh: Callable[[], AbstractContextManager[Subject]]
    stack: ExitStack = field(default_factory=ExitStack)
    _subject: Subject | None = None
    _serial: int = 0

    @property
    def subject(self) -> Subject:
        if self._subject is None:
            self._subject = self.stack.enter_context(self.fresh())
            with self._subject.client() as client:
                populate(client)
        return self._subject

    def plan(self) -> Plan:
        """Count the calls of the operation undisturbed."""
        with self.subject.client() as client:
            id = self._prepare(client)
            before = self._look(client, id)
            with ExitStack() as stack:
                every = f"trace={','.join((*CALLS, *OPENING))}"
                traces: dict[Where, Trace] = {"daemon": self._trace(stack, "daemon", every)}
                if self.scenario.archive:
                    traces["archive"] = self._trace(stack, "archive", every)
                self.scenario.act(client, id)
                store.settle(self.subject, client)
            after = self._look(client, id)
            clear(client, id)
            id = self._prepare(client)
            between = []
            for step in self.scenario.between:
                step(client, id)
                between.append(self._look(client, id))
            clear(client, id)
        points = []
        for where, trace in traces.items():
            for call, count in trace.counts().items():
                for number in range(1, count + 1):
                    points += [Point(where, call, number, fault) for fault in _faults(where, call)]
        return Plan([before, *between, after], points)

    def run(self, plan: Plan, points: Sequence[Point]) -> Outcome:
        """Break the operation at each of these points."""
        outcome = Outcome()
        for point in points:
            outcome.points += 1
            try:
                reached, problems = self._break(point, plan.allowed)
            except (AssertionError, AufsdError, OSError) as error:
                reached, problems = True, [repr(error)]
            outcome.reached += reached
            if problems:
                lines = "\n    ".join([f"{self.scenario.name}, {point}:", *problems])
                outcome.failures.append(lines)
                # one failure must not make the next
                self.stack.close()
                self._subject = None
        return outcome

    def _break(self, point: Point, allowed: list[Seen | None]) -> tuple[bool, list[str]]:
        subject = self.subject
        with subject.client() as client:
            id = self._prepare(client)
            with ExitStack() as stack:
                trace = self._trace(stack, point.where, *point.expressions)
                error = self._act(client, id, trace)
                # what the daemon does in the background is broken too; a child that failed is
                # followed by others, which would fail in the same way
                if point.where == "daemon":
                    with suppress(ConnectionLost, DaemonUnreachable):
                        store.settle(subject, client)
                elif point.fault == "STOP" and not subject.died(0):
                    # it was not the child of the operation that was stopped, but the next one,
                    # and the next operation would wait for that
                    subject.kill()
        killed = subject.died(0)
        if killed:
            if point.fault not in KILLS:
                return True, [f"the daemon died of it: {subject.log[-2000:]}"]
            subject.start()
            if not subject.ready():
                return True, [f"it does not start again: {subject.log[-2000:]}"]
        with subject.client() as client:
            problems = list(store.disorder(subject, client))
            seen = self._look(client, id)
            if error is not None and not killed:
                allowed = allowed[:-1]
                if point.call == "umount2" and isinstance(allowed[0], Seen):
                    # an unmount that fails: no reference is left, the mount stands (api.md, put)
                    allowed = [*allowed, replace(allowed[0], references=0)]
            elif error is None:
                allowed = allowed[-1:]
            if seen not in allowed:
                problems.append(f"answered {error!r}, and this is left:")
                problems += [f"  {store.difference(seen, each)}" for each in allowed]
            clear(client, id)
        return trace.injected, problems

    def _act(self, client: Client, id: str, trace: Trace) -> Exception | None:
        """Run the operation; kill the daemon if a child of it was stopped. Its error."""
        with ThreadPoolExecutor(1) as other:
            running: Future[object] = other.submit(self.scenario.act, client, id)
            running.add_done_callback(lambda _: trace.stopped.set())
            trace.stopped.wait()
            if not running.done():
                self.subject.kill()
            error = running.exception()
        if error is not None and not isinstance(error, AufsdError | ConnectionLost):
            raise error
        return error if isinstance(error, Exception) else None

    def _prepare(self, client: Client) -> str:
        self._serial += 1
        id = f"layer{self._serial}"
        for step in self.scenario.ready:
            step(client, id)
        return id

    def _look(self, client: Client, id: str) -> Seen | None:
        return store.look(self.subject, client, id)

    def _trace(self, stack: ExitStack, where: Where, *expressions: str) -> Trace:
        subject = self.subject
        pids = [subject.pid] if where == "daemon" else archive_processes(subject.pid)
        return stack.enter_context(traced(pids, *expressions))


def _faults(where: Where, call: str) -> tuple[str, ...]:
    if call in OPENING:
        return ("EMFILE",)
    kills = ("KILL",) if where == "daemon" else ("KILL", "STOP")
    return (*kills, "ENOSPC", "EIO", "EMFILE")
