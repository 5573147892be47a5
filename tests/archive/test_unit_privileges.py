"""Archive jobs with no more privileges than the systemd unit leaves the daemon."""

import re
import subprocess
import sys
from pathlib import Path
from tarfile import CHRTYPE

import pytest
import trio

from aufsd.store.dialect import Dialect
from tests.archive.shelf import needs_root, open_shelf
from tests.archive.tars import directory, entry, tar

pytestmark = [pytest.mark.mounts, needs_root]
CHECKOUT = Path(__file__).parents[2]
UNIT = CHECKOUT / "systemd" / "aufsd.service.in"


def test_the_capabilities_of_the_unit_are_enough(tmp_path: Path) -> None:
    [line] = re.findall("^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    kept = ",".join(name.lower().replace("cap_", "+", 1) for name in line.split())
    command = ["setpriv", "--bounding-set", f"-all,{kept}", "--no-new-privs", sys.executable]
    run = subprocess.run(
        [*command, "-m", "tests.archive.test_unit_privileges", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.crash
def test_a_kernel_that_restricts_mounts_by_path_alone_is_enough(tmp_path: Path) -> None:
    """Linux before 5.12 has no mount_setattr(2)."""
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-q", "-o", str(trace), "-e", "trace=mount_setattr,mount"]
    command += ["-e", "inject=mount_setattr:error=ENOSYS", sys.executable]
    run = subprocess.run(
        [*command, "-m", "tests.archive.test_unit_privileges", str(tmp_path / "store")],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
    )
    assert (run.returncode, run.stderr) == (0, "")
    calls = trace.read_text()
    assert "ENOSYS" in calls
    assert "MS_RDONLY|MS_NOSUID|MS_NODEV|MS_NOEXEC|MS_REMOUNT|MS_BIND" in calls


def test_a_container_that_may_make_no_devices_is_enough(tmp_path: Path) -> None:
    command = ["setpriv", "--bounding-set", "-mknod", "--no-new-privs", sys.executable]
    run = subprocess.run(
        [*command, "-m", "tests.archive.test_unit_privileges", str(tmp_path), "device"],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "left out the device null: making one is not permitted" in run.stdout


async def _device(root: Path) -> None:
    stream = tar(entry("null", type=CHRTYPE, devmajor=1, devminor=3), entry("f", b"x"))
    async with open_shelf(root) as shelf:
        shelf.add("a")
        print(*(await shelf.apply(stream, "a")).warnings)
        assert (shelf.path("a") / "f").read_bytes() == b"x"


async def _all_jobs(root: Path) -> None:
    stream = tar(
        directory("d", uid=5, mode=0o2750), entry("d/f", b"x", mode=0o4755), entry(".wh.gone")
    )
    async with open_shelf(root, sync="filesystem") as shelf:
        for dialect in (Dialect.AUFS, Dialect.OVERLAY):
            id = str(dialect)
            shelf.add(id, dialect)
            assert (await shelf.apply(stream, id)).warnings == []
            assert (await shelf.merge(stream, id)).size == 1
            packed = await shelf.diff(id)
            other = next(d for d in (Dialect.AUFS, Dialect.OVERLAY) if d is not dialect)
            assert await shelf.jobs.convert(id, other)
            assert await shelf.diff(id) == packed
            changes = await shelf.jobs.changes(shelf.chain(id), against=())
            assert len(changes.changes) == 2


if __name__ == "__main__":
    trio.run(_device if sys.argv[2:] else _all_jobs, Path(sys.argv[1]))
