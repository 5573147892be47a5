"""A daemon whose root is a directory at which nothing is mounted, as chroot(8) makes it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd_client import Client
from tests.archives import tar
from tests.daemon import Daemon, daemon

pytestmark = [pytest.mark.service, pytest.mark.mounts]

# all directories of the host in another one, which itself is no mount point
CHROOT = """
new=$1; shift
for name in $(ls -A /); do
    if test -L "/$name"; then cp -P "/$name" "$new/$name"
    elif test -d "/$name"; then mkdir "$new/$name"; mount --rbind "/$name" "$new/$name"
    fi
done
exec chroot "$new" "$@"
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon in a chroot, whose sockets are seen outside."""
    (tmp_path / "new").mkdir()
    prefix = ("unshare", "--mount", "--propagation", "private", "sh", "-ec", CHROOT, "sh")
    with daemon(tmp_path, prefix=(*prefix, str(tmp_path / "new"))) as made:
        yield made


def test_archives_work_in_a_chroot_and_keep_nothing_mounted(
    served: Daemon, client: Client, tmp_path: Path
) -> None:
    client.create("base")
    assert client.apply_diff("base", tar({"file": b"content"})).entries
    assert [change.path for change in client.changes("base").changes] == ["/file"]
    with (tmp_path / "out").open("wb") as out:
        client.diff("base", out)
    listing = ["tar", "-tf", str(tmp_path / "out")]
    names = subprocess.run(listing, capture_output=True, text=True, check=True)
    assert names.stdout.split() == ["./", "file"]
    # the processes of archives have a tmpfs for a root, and nothing else of the host
    assert served.process is not None
    children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text()
    for pid in children.split():
        rows = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        assert [row.split()[4] for row in rows] == ["/"]
