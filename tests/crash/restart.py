"""The start itself, cut off while it puts right what an earlier crash left."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from aufsd_client.errors import AufsdError
from tests.crash import store
from tests.crash.conftest import Fresh
from tests.crash.scenarios import FIRST, populate
from tests.crash.store import Seen
from tests.crash.strace import CALLS, Trace, traced
from tests.crash.subject import Subject
from tests.crash.sweep import Outcome, Point


def leave_behind(root: Path) -> None:
    """One of everything that a crash leaves in a store; layers `half` and `going` are there."""
    for sub in ("diff", "mnt"):
        (root / sub / "coming").mkdir()
    (root / "diff/coming/etc").mkdir()
    (root / ".aufsd/staging/layer:coming").write_text("base\n")
    (root / ".aufsd/staging/parents-half").write_text("base\n")
    staged = root / ".aufsd/staging/1.1"
    staged.mkdir()
    (staged / "half").write_text("x")
    (root / "layers/going").rename(root / ".aufsd/removing/layer:going")
    os.setxattr(root / "diff/half", "trusted.aufsd.converting", b"overlay")
    times = (root / "diff/half").stat()
    (root / "diff/half/.wh.gone").write_text("")
    os.utime(root / "diff/half", ns=(times.st_atime_ns, times.st_mtime_ns))
    for sub in ("diff", "mnt"):
        (root / sub / "123-removing").mkdir()
    (root / ".aufsd/probes/tmp1/upper").mkdir(parents=True)
    (root / ".aufsd/work/nosuch/work").mkdir(parents=True)


@dataclass
class RestartSweep:
    """Kills a start at one call after another; what two layers are like has to stay."""

    fresh: Fresh

    def points(self) -> list[Point]:
        """Where a start can be killed, its background work included."""
        with self.fresh() as subject:
            self._crash(subject)
            with ExitStack() as stack:
                trace = self._start(subject, stack, f"trace={','.join(CALLS)}")
                assert subject.ready(), subject.log
                with subject.client() as client:
                    assert not store.settle(subject, client)
        return [
            Point("daemon", call, number, "KILL")
            for call, most in trace.counts().items()
            for number in range(1, most + 1)
        ]

    def run(self, points: Sequence[Point]) -> Outcome:
        """Kill a start at each of these points."""
        outcome = Outcome()
        for point in points:
            outcome.points += 1
            with self.fresh() as subject:
                before = self._crash(subject)
                with ExitStack() as stack:
                    trace = self._start(subject, stack, *point.expressions)
                    if subject.ready():
                        with subject.client() as client:
                            try:
                                store.settle(subject, client)
                            except ConnectionError:
                                assert subject.died()
                outcome.reached += trace.injected
                subject.start()
                if problems := self._wrong(subject, before):
                    outcome.failures.append("\n    ".join([f"start, {point}:", *problems]))
        return outcome

    def _wrong(self, subject: Subject, before: dict[str, Seen | None]) -> list[str]:
        if not subject.ready():
            return [f"it does not start again: {subject.log[-2000:]}"]
        with subject.client() as client:
            try:
                problems = list(store.disorder(subject, client))
                for id, seen in before.items():
                    if (now := store.look(subject, client, id)) != seen:
                        problems.append(f"{id}: {store.difference(now, seen)}")
            except (AssertionError, AufsdError) as error:
                problems = [repr(error)]
        return problems

    def _crash(self, subject: Subject) -> dict[str, Seen | None]:
        """Make layers, kill the daemon, leave a mess; what the layers are to be afterwards."""
        with subject.client() as client:
            populate(client)
            for id in ("kept", "half", "going"):
                client.create(id, parent="base")
                client.apply_diff(id, FIRST)
            client.get("kept")
            client.get("kept")
            seen = {id: store.look(subject, client, id) for id in ("base", "kept", "half")}
        subject.kill()
        leave_behind(subject.root)
        return {**seen, "going": None, "coming": None}

    def _start(self, subject: Subject, stack: ExitStack, *expressions: str) -> Trace:
        subject.start(held=True)
        trace = stack.enter_context(traced([subject.pid], *expressions))
        subject.release()
        return trace
