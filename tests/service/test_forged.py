"""A store that somebody else prepared: no call is an incident, nothing is written elsewhere."""

import os
from pathlib import Path

import pytest

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
