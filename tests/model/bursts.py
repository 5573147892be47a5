"""A burst: what several clients do at once with a few layers, by a seed; and what came of it.

After each burst all is looked at when nothing runs any more, so that the next one begins at a state
that is known.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from tests.daemon import Daemon, eventually
from tests.model.clients import Record, Worker, abandon, hold_and_die
from tests.model.explain import Event, explain, shortest, with_neighbours
from tests.model.world import DONE, UNKNOWN, Call, State
from tests.small import filled

CLIENTS = 8
# calls of each client in a burst
LENGTH = 5
IDS = ("a", "b", "c", "d", "e", "f")
NAMES = ("f0", "f1", "f2", "f3")
_WEIGHTS = {
    "create": 12,
    "remove": 8,
    "get": 6,
    "put": 6,
    "use": 8,
    "apply_diff": 10,
    "diff": 5,
    "changes": 5,
    "diff_size": 4,
    "get_metadata": 5,
    "exists": 2,
    "list": 3,
    "mounts": 3,
    "check": 3,
    "cleanup": 2,
    "outside": 1,
    "abandon": 2,
    "die": 2,
}


@dataclass
class Run:
    """A daemon under test, the state that it is in, and where the next choices come from."""

    daemon: Daemon
    seed: int
    state: State
    serial: "count[int]" = field(default_factory=lambda: count(1))
    bursts: int = 0
    # calls whose clients went away: the daemon may come to them after the burst
    left: list[Event] = field(default_factory=list)
    calls: int = 0

    def burst(self, *, kill: bool = False, disk: Path | None = None) -> None:
        """One burst; AssertionError, with seed and shortest window, if nothing explains it.

        The daemon is killed meanwhile, or `disk`, on which the store lies, filled and emptied.
        """
        self.bursts += 1
        chance = random.Random(f"{self.seed}/{self.bursts}")
        record = Record(IDS)
        workers = [Worker(self.daemon, record, number) for number in range(CLIENTS)]
        plans = [list(self._plan(chance, number)) for number in range(CLIENTS)]
        after = chance.randrange(CLIENTS * LENGTH) if kill else -1
        with ExitStack() as stack:
            if disk is not None:
                stack.enter_context(_full_at_times(disk, record, chance.random()))
            _all_at_once(self.daemon, record, workers, plans, kill_after=after)
        if kill:
            began = time.monotonic()
            if self.daemon.process is not None and self.daemon.process.poll() is None:
                self.daemon.kill()
            self.daemon.start()
            record.note(Call("restart"), DONE, began, CLIENTS)
        self._look(record)
        for worker in workers:
            worker.client.close()
        cut = [event for event in record.events if event.call.method in ("diff", "apply_diff")]
        record.events += self.left
        self.left = [] if kill else [event for event in cut if event.optional]
        self._judge(record)

    def _look(self, record: Record) -> None:
        """Ask for all there is, once nothing is left of what was cut off."""
        worker = Worker(self.daemon, record, CLIENTS)
        dead = {event.call.hold for event in record.events if event.call.method == "death"}

        def settled() -> bool:
            rows = worker.client.mounts().mounts
            held = {f"pid:{each.pid}" for row in rows for each in row.holders}
            # what a process held last is being unmounted for a moment after its end
            going = [row for row in rows if not row.holders]
            return not (worker.client.status().jobs or held & dead or going)

        eventually(settled)
        for method in ("mounts", "list", "kernel", "check"):
            worker.make(Call(method))
        for row in worker.client.list().layers:
            worker.make(Call("content" if self.state.snapshots else "diff", row.id))
        worker.client.close()

    def _judge(self, record: Record) -> None:
        history = with_neighbours(record.events)
        self.calls += len(history)
        found = explain(self.state, history)
        if found is None:
            raise AssertionError(self._told(shortest(self.state, history)))
        self.state = found

    def _told(self, window: list[Event]) -> str:
        lines = [
            f"no order of these calls explains what they answered: seed {self.seed}, "
            f"burst {self.bursts}",
            *(f"  {id}: {layer}" for id, layer in self.state.layers),
            *map(str, window),
        ]
        return "\n".join(lines)

    # --- what is done -------------------------------------------------------------------------

    def _plan(self, chance: random.Random, number: int) -> Iterator[Call]:
        for _ in range(LENGTH):
            method = chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
            yield from self._calls(chance, method, number)

    def _calls(self, chance: random.Random, method: str, number: int) -> Iterator[Call]:
        id = chance.choice(IDS)
        lower = [each for each in IDS if each < id]
        match method:
            case "create":
                yield Call(method, id, chance.choice(lower) if lower else "")
            case "remove":
                yield Call(method, id, force=chance.random() < 0.3)
            case "get" | "put":
                # counted, or under one of three names
                name = chance.choice(("", "", "name:x", "name:y"))
                yield Call(method, id, hold=name)
            case "apply_diff" | "abandon":
                if method == "abandon" and chance.random() < 0.5:
                    yield Call("abandon diff", id)
                    return
                rows = chance.sample(NAMES, chance.randint(1, 3))
                tar = tuple(
                    (name, None if chance.random() < 0.3 else next(self.serial) * 2)
                    for name in rows
                )
                yield Call("apply_diff" if method == "apply_diff" else "abandon apply", id, tar=tar)
            case "diff" | "changes" | "diff_size":
                yield Call(method, id, chance.choice(("", "", chance.choice(IDS))))
            case "use":
                hold = f"name:c{number}"
                yield Call("get", id, hold=hold)
                for _ in range(chance.randint(1, 4)):
                    what = chance.choice(("look", "read", "link", "unlink"))
                    name = "" if what == "look" else chance.choice(NAMES)
                    token = next(self.serial) * 2 + 1 if what == "link" else 0
                    yield Call(what, id, name=name, hold=hold, token=token)
                yield Call("put", id, hold=hold)
            case "list" | "mounts" | "check" | "cleanup":
                yield Call(method)
            case "die":
                # what it takes references to, and how many answers it sees
                ids = chance.choices(IDS, k=chance.randint(1, 3))
                yield Call(method, name=" ".join(ids), token=chance.randint(0, len(ids)))
            case _:
                yield Call(method, id)


@contextmanager
def _full_at_times(disk: Path, record: Record, seed: float) -> Iterator[None]:
    """Inside, the disk is full, and then not, again and again."""
    chance, over = random.Random(seed), threading.Event()

    def fill() -> None:
        while not over.wait(chance.random() / 20):
            began = time.monotonic()
            with filled(disk) as again:
                while chance.random() < 0.9 and not over.wait(0.01):
                    again()
            record.note(Call("full"), DONE, began, CLIENTS)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _all_at_once(
    daemon: Daemon,
    record: Record,
    workers: list[Worker],
    plans: list[list[Call]],
    *,
    kill_after: int,
) -> None:
    """Each client makes its calls in a thread of its own; the daemon is killed after so many."""
    start = threading.Barrier(len(workers))
    done = count(1)
    failures: list[BaseException] = []

    def work(worker: Worker, plan: list[Call]) -> None:
        try:
            start.wait()
            for call in plan:
                if _one(worker, call) == UNKNOWN:
                    # the daemon is gone
                    return
                if next(done) == kill_after:
                    daemon.kill()
        except BaseException as error:
            failures.append(error)
            start.abort()

    threads = [
        threading.Thread(target=work, args=both) for both in zip(workers, plans, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _one(worker: Worker, call: Call) -> object:
    special: dict[str, Callable[[], None]] = {
        "abandon apply": lambda: abandon(worker, call._replace(method="apply_diff")),
        "abandon diff": lambda: abandon(worker, call._replace(method="diff")),
        "die": lambda: hold_and_die(worker, call.name.split(), call.token),
    }
    if call.method in special:
        special[call.method]()
        return None
    return worker.make(call)
