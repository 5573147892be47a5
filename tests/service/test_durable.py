"""What is told as done is on the disk: the order of syncs and renames, as strace(1) saw it.

A power cut keeps of the writes before a sync all, and of those after it any. So each operation has
to sync what its commit stands for before the commit, and the commit's own name before it answers.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from aufsd_client import Client
from tests.archives import tar
from tests.crash.strace import Trace, traced, untraceable
from tests.daemon import Daemon, archive_processes, daemon

pytestmark = pytest.mark.service

SYNCS = ("fsync", "fdatasync", "syncfs", "sync", "sync_file_range", "msync")
NAMES = ("rename", "renameat", "renameat2", "mkdir", "unlink")
CONTENT = ("openat", "write", "symlink", "linkat", "fsetxattr", "fremovexattr", "mknodat")


@contextmanager
def watched(served: Daemon) -> Iterator[Trace]:
    """The daemon and its archive processes traced, calls that sync and calls that name things."""
    if why := untraceable():
        pytest.skip(why)
    assert served.process is not None
    pids = [served.process.pid, *archive_processes(served.process.pid)]
    with traced(pids, f"trace={','.join((*SYNCS, *NAMES, *CONTENT))}") as trace:
        yield trace


def positions(trace: Trace, *patterns: str) -> list[int]:
    """Where each of these calls stands in the trace; all of them have to be there."""
    found = []
    for pattern in patterns:
        hits = [number for number, line in enumerate(trace.lines) if re.search(pattern, line)]
        assert hits, f"no {pattern} in:\n{''.join(trace.lines)}"
        found.append(hits[0])
    return found


def assert_in_order(trace: Trace, patterns: Sequence[str]) -> None:
    found = positions(trace, *patterns)
    assert found == sorted(found), f"{patterns} came as {found}:\n{''.join(trace.lines)}"


def test_a_created_layer_is_on_the_disk_before_it_counts(served: Daemon, client: Client) -> None:
    client.create("base")
    with watched(served) as trace:
        client.create("top", parent="base")
    root = served.root
    commit = rf"renameat2\(.*staging/layer:top.*{root}/layers/top"
    for before in (
        rf"fsync\(\d+<{root}/diff/top>",
        rf"fsync\(\d+<{root}/diff>",
        rf"fsync\(\d+<{root}/mnt>",
        rf"fsync\(\d+<{root}/.aufsd/staging/layer:top>",
    ):
        assert_in_order(trace, (before, commit))
    assert_in_order(trace, (rf'mkdir\("{root}/mnt/top"', rf"fsync\(\d+<{root}/mnt>"))
    assert_in_order(trace, (commit, rf"fsync\(\d+<{root}/layers>"))


@pytest.mark.parametrize("full", [False, True], ids=["empty", "full"])
def test_applied_content_is_on_the_disk_before_it_takes_the_layers_place(
    served: Daemon, client: Client, full: bool
) -> None:
    client.create("base")
    if full:
        client.apply_diff("base", tar({"old": b"x" * 10_000}))
    with watched(served) as trace:
        client.apply_diff("base", tar({"new": b"y" * 10_000, "link": "new"}))
    root = served.root
    commit = rf'renameat2\(.*{root}/diff/base".*RENAME_EXCHANGE'
    for before in (r'openat\(.*"new", O_\w+\|O_CREAT', r'symlink\("new"'):
        assert_in_order(trace, (before, r"syncfs\("))
    assert_in_order(trace, (r"syncfs\(", commit, rf"fsync\(\d+<{root}/diff>"))
    # and what was there before is touched only after that
    assert_in_order(trace, (rf"fsync\(\d+<{root}/diff>", rf"rename\(.*{root}/.aufsd/removing/"))


def test_a_removal_is_on_the_disk_before_content_goes(served: Daemon, client: Client) -> None:
    client.create("base")
    client.apply_diff("base", tar({"file": b"x"}))
    with watched(served) as trace:
        client.remove("base")
    root = served.root
    assert_in_order(
        trace,
        (
            rf'rename\("{root}/layers/base"',
            rf"fsync\(\d+<{root}/layers>",
            rf'rename\("{root}/diff/base"',
        ),
    )


def test_a_conversion_is_on_the_disk_before_it_counts(served: Daemon, client: Client) -> None:
    client.create("base")
    client.create("top", parent="base")
    client.apply_diff("top", tar({".wh.gone": b""}))
    with watched(served) as trace:
        client.convert("top", "aufs")
    marked = r"fsetxattr\(.*aufsd.converting"
    counts = r"fremovexattr\(.*aufsd.dialect"
    done = r"fremovexattr\(.*aufsd.converting"
    assert_in_order(trace, (marked, r"syncfs\(", r"mknodat\(.*\.wh\.gone", counts, done))
    syncs = [number for number, line in enumerate(trace.lines) if "syncfs(" in line]
    assert len(syncs) == 2
    assert positions(trace, r"mknodat\(")[0] < syncs[1] < positions(trace, counts)[0]
    assert_in_order(trace, (done, r"fsync\("))


def test_sync_none_syncs_nothing(tmp_path: Path) -> None:
    with daemon(tmp_path, "--sync", "none") as served, served.client() as client:
        client.create("base")
        with watched(served) as trace:
            client.create("top", parent="base")
            client.apply_diff("top", tar({".wh.gone": b"", "new": b"x"}))
            client.convert("top", "aufs")
            client.get("top")
            client.put("top")
            client.remove("top")
        assert positions(trace, r"renameat2\(", r"syncfs\(|openat\(.*new")
        assert [line for line in trace.lines if re.search(rf"\b({'|'.join(SYNCS)})\(", line)] == []
