"""A store that somebody else prepared: no call is an incident, nothing is written elsewhere."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from aufsd.kernel import syscalls
from aufsd_client import errors
from tests.daemon import daemon
from tests.service.test_identity import CALLS, filled, tree

pytestmark = [pytest.mark.service, pytest.mark.mounts]

DIALECT, CONVERTING = ("dialect",), ("converting",)
OTHERS = ("settled", "fingerprint", "parent", "origin", "size", "times", "usage")


@pytest.mark.parametrize(
    ("marks", "value"),
    [
        *((DIALECT, "none"), (DIALECT, "../../victim"), (CONVERTING, ""), (CONVERTING, "none")),
        *((OTHERS, "²"), (OTHERS, "\udcff\0"), (OTHERS, "-1 1 1")),
    ],
)
def test_forged_marks_end_no_start_and_no_call_in_an_incident(
    tmp_path: Path, marks: tuple[str, ...], value: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    with daemon(tmp_path) as served:
        with served.client() as client:
            filled(client)
            client.seal("spare")
        served.stop()
        for path in [*(served.root / "diff").rglob("*"), *(served.root / "diff").iterdir()]:
            for mark in marks:
                os.setxattr(path, f"trusted.aufsd.{mark}", os.fsencode(value))
        for id in ("top", "alone", "base", "spare"):
            work = served.root / ".aufsd/work" / id
            work.mkdir(exist_ok=True)
            (work / "union").symlink_to(value.strip("\0") or "overlay")
        before = tree(victim), victim.stat().st_mtime_ns
        served.start()
        with served.client() as client:
            for call in CALLS.values():
                try:
                    call(client)
                except errors.InternalError:
                    raise
                except errors.AufsdError:
                    continue
        assert "incident" not in served.log
        assert "Traceback" not in served.log
        assert (tree(victim), victim.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    "backend", ["overlay", pytest.param("fuse-overlayfs", marks=pytest.mark.fuse)]
)
@pytest.mark.parametrize("where", ["work", "in work", "empty"])
def test_nothing_planted_for_the_file_systems_own_use_leads_elsewhere(
    tmp_path: Path, backend: str, where: str
) -> None:
    """overlayfs empties its work directory, and fuse-overlayfs's helper writes into it."""
    victim = tmp_path / "victim"
    (victim / "work/kept").mkdir(parents=True)
    for name in ("helper", "helper.log", "helper.log.new", "helper.new", "file"):
        (victim / name).write_text("precious")
    os.setxattr(victim / "file", "user.fuseoverlayfs.opaque", b"y")
    with daemon(tmp_path, "--backend", backend) as served:
        with served.client() as client:
            filled(client)
        served.stop()
        private = served.root / ".aufsd"
        if where == "work":
            replaced(private / "work/top", victim)
        elif where == "empty":
            replaced(private / "empty", victim)
        else:
            (private / "work/top").mkdir(exist_ok=True)
            record = {"pid": 1 << 40, "start": 1, "device": 1, "top": str(victim)}
            (private / "work/top/helper").write_text(json.dumps(record))
            for name in ("work", "helper.log.new", "helper.new", "helper.log", "xino", "union"):
                replaced(private / "work/top" / name, victim / name)
        before = [(path, path.lstat().st_mtime_ns) for path in sorted(victim.rglob("*"))]
        if where == "empty":
            status, said = served.refused()
            assert (status, "leads through a symlink" in said) == (3, True)
        else:
            served.start()
            with served.client() as client:
                with client.mounted("top") as path:
                    (Path(path) / "new").touch()
                assert client.remove("top").removed
        assert [(path, path.lstat().st_mtime_ns) for path in sorted(victim.rglob("*"))] == before
        assert os.listxattr(victim / "file") == ["user.fuseoverlayfs.opaque"]
        assert "incident" not in served.log


def replaced(path: Path, target: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    path.symlink_to(target)


@pytest.mark.parametrize("mounted", [False, True])
def test_a_mark_is_written_to_no_directory_but_the_layers_own(
    tmp_path: Path, mounted: bool
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    for mark in ("fingerprint", "usage", "dialect"):
        os.setxattr(victim, f"trusted.aufsd.{mark}", b"overlay")
    before = {name: os.getxattr(victim, name) for name in os.listxattr(victim)}
    with daemon(tmp_path, "--backend", "overlay") as served, served.client() as client:
        filled(client)
        content = served.root / "diff/spare"
        content.rename(tmp_path / "moved")
        if mounted:
            content.mkdir()
            syscalls.mount(str(victim), str(content), "", syscalls.MS_BIND)
        else:
            content.symlink_to(victim)
        try:
            for call in CALLS.values():
                with suppress(errors.AufsdError):
                    call(client)
        finally:
            if mounted:
                syscalls.umount2(str(content), syscalls.MNT_DETACH)
        assert "incident" not in served.log
    assert {name: os.getxattr(victim, name) for name in os.listxattr(victim)} == before
    assert os.listdir(victim) == []
