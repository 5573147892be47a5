"""Who a peer is, and what another process sees at a path, by the two mount tables."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from aufsd.kernel import mountinfo
from aufsd.kernel.peer import identify, process
from aufsd.kernel.sight import Place, in_our_namespace, place_of, propagates, sees

UNION = os.makedev(0, 40)
DISK = os.makedev(8, 1)
HOST = b"""\
20 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
21 20 0:21 / /srv rw - tmpfs t rw
30 21 8:1 /stores/a /srv/a rw - ext4 /dev/sda1 rw
40 30 0:40 / /srv/a/mnt/top rw - overlay none rw
50 20 0:50 / /mnt rw - tmpfs u rw
"""


@pytest.mark.parametrize(
    ("table", "path", "found"),
    [
        (HOST, "/srv/a/mnt/top", Place(UNION, "")),
        (HOST, "/srv/a/mnt/to", Place(DISK, "/stores/a/mnt/to")),
        (HOST, "/srv/a/diff/base", Place(DISK, "/stores/a/diff/base")),
        (HOST, "/etc", Place(DISK, "/etc")),
        (b"20 1 8:1 /stores / rw - ext4 d rw\n", "/a/diff", Place(DISK, "/stores/a/diff")),
        # covered: by a mount over the same point, or over a directory above
        (
            HOST + b"60 40 0:60 / /srv/a/mnt/top rw - tmpfs v rw\n",
            "/srv/a/mnt/top",
            Place(os.makedev(0, 60), ""),
        ),
        (
            HOST + b"60 21 0:60 / /srv rw - tmpfs v rw\n",
            "/srv/a/mnt/top",
            Place(os.makedev(0, 60), "/a/mnt/top"),
        ),
        # the root itself is covered
        (
            HOST + b"60 20 0:60 / / rw - tmpfs v rw\n",
            "/srv/a/mnt/top",
            Place(os.makedev(0, 60), "/srv/a/mnt/top"),
        ),
        # of a process in a chroot the table does not say what its root is
        (b"40 30 0:40 / /mnt/top rw - overlay none rw\n", "/mnt/other", None),
    ],
)
def test_what_is_seen_at_a_path_is_what_the_mounts_on_the_way_say(
    table: bytes, path: str, found: Place | None
) -> None:
    assert place_of(list(mountinfo.parse(table)), path) == found


def test_a_process_that_is_gone_tells_nothing() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    assert in_our_namespace(pid) is None
    assert sees(pid, "/") is None
    assert in_our_namespace(os.getpid()) is True
    assert sees(os.getpid(), "/") is True


@pytest.mark.parametrize("alive", [True, False])
def test_a_peer_is_known_by_its_start_time_only_while_it_lives(tmp_path: Path, alive: bool) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        connecting = f"s = socket.socket(socket.AF_UNIX); s.connect({str(tmp_path / 's')!r})"
        script = f"import socket, sys; {connecting}; sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as peer:
            sock, _ = listener.accept()
            expected = process(peer.pid)[1]
            if not alive:
                peer.communicate()
            with sock:
                found = identify(sock, peer.pid, 0, 0)
            peer.communicate()
    assert (found.pid, found.start) == (peer.pid, expected if alive else 0)


@pytest.mark.parametrize(
    ("theirs", "seen"),
    [
        (b"20 1 8:1 / / rw shared:7 - ext4 /dev/sda1 rw\n", True),
        (b"20 1 8:1 / / rw shared:9 master:7 - ext4 /dev/sda1 rw\n", True),
        (b"20 1 8:1 / / rw shared:77 - ext4 /dev/sda1 rw\n", False),
        (b"20 1 8:1 / / rw - ext4 /dev/sda1 rw\n", False),
    ],
)
def test_mounts_appear_where_a_peer_or_a_slave_of_the_mount_above_is(
    theirs: bytes, seen: bool
) -> None:
    ours = b"""\
20 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
21 20 8:2 / /srv rw shared:7 - ext4 /dev/sdb1 rw
"""
    tables = list(mountinfo.parse(ours)), list(mountinfo.parse(theirs))
    assert propagates(*tables, "/srv/store/mnt") is seen
    assert propagates(*tables, "/var/store/mnt") is False
