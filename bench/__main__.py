"""The command: which cases, on what, and where the results go."""

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path

from aufsd.kernel import syscalls
from bench import (
    archives,
    calls,
    checkpoints,
    docker,
    ground,
    mounts,
    peers,
    priority,
    relabel,
    report,
    store,
)
from bench.figures import Curve
from bench.harness import Bench, Case
from bench.peers import Peers

CASES: tuple[Case, ...] = (
    *calls.CASES,
    *mounts.CASES,
    *checkpoints.CASES,
    *archives.CASES,
    *store.CASES,
    *relabel.CASES,
    *docker.CASES,
)
OUT = Path(__file__).parent.parent / "build" / "bench"


def main() -> int:
    """Measure, print, write; 0 if all could be measured, whether or not goals are missed."""
    arguments = _arguments()
    chosen = [case for case in CASES if not arguments.case or _named(case, arguments.case)]
    if arguments.list or not chosen:
        print("\n".join(case.name for case in CASES))
        return 0 if arguments.list else 2
    if os.geteuid() != 0:
        sys.exit("bench: only root can mount; run it as root")
    # as an exception, so that daemons and images go
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: told to stop"))
    # what is mounted here is seen by nobody else, and goes with this process
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    found = peers.find()
    run = report.Run(
        {**peers.machine(), "stores on": ground.describe(arguments.dir)},
        found.versions,
        list(found.missing.values()),
    )
    print(report.heading(run), flush=True)
    with priority.raised():
        for case in chosen:
            print(f"... {case.name}", file=sys.stderr, flush=True)
            _measure(case, run, Path(arguments.dir), found, quick=arguments.quick)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report.write(run, arguments.out)
    print(report.table(run))
    return 1 if run.failures else 0


def _measure(case: Case, run: report.Run, where: Path, found: Peers, *, quick: bool) -> None:
    try:
        with ground.work(str(where)) as work:
            for outcome in case.run(Bench(work, found, quick)):
                if isinstance(outcome, Curve):
                    run.curves.append(outcome)
                else:
                    run.figures.append(outcome)
                    print(report.line(outcome), file=sys.stderr, flush=True)
    except Exception as failure:
        # one case that cannot run here is no reason to lose the others
        traceback.print_exception(failure)
        run.failures.append(f"{case.name}: {failure}")


def _named(case: Case, names: list[str]) -> bool:
    return any(case.name == name or case.name.startswith(f"{name}-") for name in names)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("case", nargs="*", help="cases to run, or what their names begin with")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller trees")
    parser.add_argument("--dir", default="/var/tmp", help="where stores are made, on a real disk")
    parser.add_argument("--out", type=Path, default=OUT, help="where bench.json and bench.svg go")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
