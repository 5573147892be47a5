"""Everything again as an ordinary user in a user namespace: what differs there, and what does not.

The rest of the suite runs there too, started as an ordinary user.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from aufsd.store.dialect import WITH_MARKS, Dialect
from aufsd_client.errors import BadArchive
from tests.archive.shelf import NAMESPACE, Shelf, open_shelf
from tests.archive.tars import CHARACTER, directory, entry, listing, tar
from tests.tiers import ROOT_IN_HOST

pytestmark = [pytest.mark.mounts, pytest.mark.userns]


def test_archives_in_a_user_namespace(tmp_path: Path) -> None:
    """Only user 0 is mapped, so CAP_SYS_ADMIN is not the real one: user.* xattrs are used."""
    command = [sys.executable, "-m", "tests.archive.test_user_namespace", str(tmp_path)]
    if ROOT_IN_HOST:
        command = ["unshare", "--user", "--map-root-user", "--mount", *command]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (run.returncode, run.stderr) == (0, "")


async def _inside(root: Path) -> None:
    assert NAMESPACE == "user"
    async with open_shelf(root) as shelf:
        for dialect in WITH_MARKS:
            await _check(shelf, dialect)


async def _check(shelf: Shelf, dialect: Dialect) -> None:
    id = str(dialect)
    at = shelf.add(id, dialect)
    forged = {"SCHILY.xattr.user.overlay.opaque": "y", "SCHILY.xattr.user.fine": "z"}
    stream = tar(
        directory("."),
        entry(".wh.gone"),
        directory("d", mode=0o2750, pax_headers=forged),
        entry("d/f", b"content", mode=0o4711),
        entry("dev", type=CHARACTER, devmajor=1, devminor=3),
        entry("fifo", type=b"6"),
        directory("o"),
        entry("o/.wh..wh..opq"),
    )
    result = await shelf.apply(stream, id)
    assert sorted(result.warnings) == [
        "dropped the attribute user.overlay.opaque of d",
        "left out the device dev: making one is not permitted",
    ]
    assert result.size == 7
    assert (at / "d").stat().st_mode & 0o7777 == 0o2750
    assert os.getxattr(at / "d", "user.fine") == b"z"
    packed, told = await shelf.pack(id)
    assert told.warnings == []
    names = [member.name for member in listing(packed)]
    assert names == [".", ".wh.gone", "d", "d/f", "fifo", "o", "o/.wh..wh..opq"]
    assert b"overlay" not in packed
    shelf.add(f"{id}-other", dialect)
    with pytest.raises(BadArchive, match="belongs to 1000:1000"):
        await shelf.apply(tar(entry("x", uid=1000, gid=1000)), f"{id}-other")
    other = next(d for d in WITH_MARKS if d is not dialect)
    assert await shelf.jobs.convert(id, other)
    assert await shelf.diff(id) == packed
    changes = await shelf.jobs.changes(shelf.chain(id), against=())
    assert [c.path for c in changes.changes] == ["/d", "/d/f", "/fifo", "/o"]


if __name__ == "__main__":
    trio.run(_inside, Path(sys.argv[1]))
