"""Killed and started again: mounts stay, counts come back, what was cut off is put right."""

import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from aufsd.active.replay import DIFFERENCES
from aufsd.kernel import syscalls
from aufsd_client import Client, errors
from aufsd_client.wire import encode_request
from tests.archives import tar
from tests.daemon import Daemon, eventually

pytestmark = pytest.mark.service


@pytest.fixture
def mounted(served: Daemon, client: Client) -> Daemon:
    """`top` on `base` with two references, and `alone`, whose content is given out, with one."""
    client.create("base")
    client.create("top", parent="base")
    client.create("alone")
    client.get("top")
    client.get("top")
    client.get("alone")
    return served


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_counts_and_mounts_survive(mounted: Daemon, how: str) -> None:
    getattr(mounted, how)()
    assert mounted.mounts() == ["top"]
    mounted.start()
    with mounted.client() as client:
        rows = {row.id: row.references for row in client.mounts().mounts}
        assert rows == {"top": 2, "alone": 1}
        assert client.put("top").references == 1
        assert client.put("top").mounted is False
        assert mounted.mounts() == []
        assert client.put("alone").references == 0


def test_every_get_that_was_answered_before_a_kill_is_counted_after_it(mounted: Daemon) -> None:
    """Calls that arrive together share a write of the journal, and are answered after it."""
    peers, calls, answered = 64, 50, 0
    with ExitStack() as stack:
        crowd = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(peers)]
        for peer in crowd:
            peer.connect(mounted.socket)
        for peer in crowd:
            peer.sendall(encode_request("1", "get", {"id": "top"}) * calls)
        answered += crowd[0].recv(1 << 16).count(b"\n")
        mounted.kill()
        for peer in crowd:
            with suppress(ConnectionResetError):
                while data := peer.recv(1 << 16):
                    answered += data.count(b"\n")
    mounted.start()
    with mounted.client() as client:
        (row,) = [row for row in client.mounts().mounts if row.id == "top"]
        assert 0 < answered <= row.references - 2 <= peers * calls


def test_a_mount_that_vanished_while_nobody_served_counts_nothing(mounted: Daemon) -> None:
    mounted.kill()
    syscalls.umount2(str(mounted.root / "mnt/top"))
    mounted.start()
    with mounted.client() as client:
        assert differences(client) == {"vanished": 1}
        assert "no longer mounted, 2 references dropped" in mounted.log
        assert [row.id for row in client.mounts().mounts] == ["alone"]
        assert client.get("top").references == 1


def test_a_lost_journal_leaves_a_count_of_one(mounted: Daemon) -> None:
    """moby 5b6b8df0c1: first touch of a path adds 1 if it is mounted already."""
    mounted.kill()
    (mounted.directory / "run/mounts.journal").unlink()
    mounted.start()
    with mounted.client() as client:
        assert differences(client) == {"appeared": 1}
        assert {row.id: row.references for row in client.mounts().mounts} == {"top": 1}
        assert client.put("top").mounted is False


def test_a_second_daemon_and_another_store_leave_the_counts_alone(
    mounted: Daemon, tmp_path: Path
) -> None:
    """moby#22763: whoever gives a second daemon a root and sockets of its own forgets the rest."""
    other = ("--socket", f"{tmp_path}/b.sock", "--monitor-socket", f"{tmp_path}/n.sock")
    second = Daemon(tmp_path, tmp_path / "second")
    status, said = second.refused(*other)
    assert status == 3
    assert said.startswith(f"aufsd: the daemon that serves {mounted.root} keeps its table of ")
    assert len(said.splitlines()) == 1
    assert not second.root.exists()
    # as after a change of `root` in the configuration
    mounted.stop()
    second.start()
    assert f"was of another store, at {mounted.root}: it is kept as mounts." in mounted.log
    assert second.stop() == 0
    mounted.start()
    assert "is of this store: its counts are taken back" in mounted.log
    with mounted.client() as client:
        rows = {row.id: row.references for row in client.mounts().mounts}
        assert rows == {"top": 2, "alone": 1}
        assert differences(client) == {}


def test_a_damaged_journal_is_told_until_the_next_start(mounted: Daemon) -> None:
    mounted.kill()
    journal = mounted.directory / "run/mounts.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:-1], b"rubbish\n"]))
    for degraded in (True, False):
        mounted.start()
        with mounted.client() as client:
            (check,) = [each for each in client.health().checks if each.name == "start"]
            told = f"{journal} is damaged in line {len(lines)} of {len(lines)}: "
            assert check.detail.startswith(told) == degraded
        mounted.kill()
    assert '"event":"journal"' in mounted.log


def test_references_of_a_process_go_with_it_also_across_a_restart(mounted: Daemon) -> None:
    script = (
        "import sys; from aufsd_client import Client\n"
        f"client = Client({mounted.socket!r})\n"
        "client.get('top', hold='process'); print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        mounted.kill()
        mounted.start()
        with mounted.client() as client:
            (row,) = [row for row in client.mounts().mounts if row.id == "top"]
            assert row.references == 3
            assert {held.pid for held in row.holders if held.hold == "process"} == {holder.pid}
            assert differences(client) == {}
            holder.kill()
            holder.wait()
            eventually(lambda: references(client, "top") == 2)


def test_a_process_that_ended_while_nobody_served_holds_nothing_and_is_told(
    mounted: Daemon,
) -> None:
    script = (
        f"from aufsd_client import Client; Client({mounted.socket!r}).get('top', hold='process')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", f"{script}; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        mounted.kill()
        holder.kill()
    mounted.start()
    with mounted.client() as client:
        eventually(lambda: references(client, "top") == 2)
        assert differences(client) == {"holder": 1}
        assert f"process {holder.pid} has ended" in mounted.log


def differences(client: Client) -> dict[str, int]:
    """What the start found otherwise than the last daemon left it, as metrics say it."""
    found = re.findall(
        r'^aufsd_start_differences_total\{kind="(\w+)"\} (\d+)', client.metrics().text, re.MULTILINE
    )
    assert {kind for kind, _ in found} == set(DIFFERENCES)
    return {kind: int(count) for kind, count in found if int(count)}


def references(client: Client, id: str) -> int:
    """How many references a layer has."""
    return sum(row.references for row in client.mounts().mounts if row.id == id)


def test_what_an_apply_left_in_staging_is_undone_and_said(mounted: Daemon) -> None:
    mounted.kill()
    staged = mounted.root / ".aufsd/staging/1.1"
    staged.mkdir()
    (staged / "half").write_text("x")
    mounted.start()
    assert '"undone"' in mounted.log
    assert os.listdir(mounted.root / ".aufsd/staging") == []
    with mounted.client() as client:
        assert client.check().problems == []


def test_a_killed_daemon_leaves_a_layer_as_it_was(served: Daemon, client: Client) -> None:
    client.create("base")
    client.apply_diff("base", tar({"kept": b"x"}))
    read, write = os.pipe()
    os.write(write, tar({"new": b"x" * 100_000})[:50_000])
    script = (
        "import os, sys; from aufsd_client import Client\n"
        f"Client({served.socket!r}).apply_diff('base', os.fdopen(int(sys.argv[1]), 'rb'))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(read)], pass_fds=[read], stderr=subprocess.DEVNULL
    ) as sender:
        while not client.status().jobs:
            assert sender.poll() is None
        served.kill()
        os.close(write)
        os.close(read)
    served.start()
    with served.client() as again:
        assert os.listdir(served.root / "diff/base") == ["kept"]
        assert again.check().problems == []
        again.apply_diff("base", tar({"new": b"y"}))
        assert sorted(os.listdir(served.root / "diff/base")) == ["kept", "new"]


def test_a_stale_socket_file_is_replaced(served: Daemon) -> None:
    served.kill()
    assert Path(served.socket).exists()
    served.start()
    with served.client() as client:
        client.ping()


def test_a_busy_unmount_is_told_with_its_holder(mounted: Daemon) -> None:
    path = mounted.root / "mnt/top"
    with subprocess.Popen(["sleep", "60"], cwd=path) as holder, mounted.client() as client:
        client.put("top")
        with pytest.raises(errors.UnmountBusy) as caught:
            client.put("top")
        holders = caught.value.data["holders"]
        assert isinstance(holders, list)
        assert holder.pid in [each["pid"] for each in holders]
        assert client.health().status == "degraded"
        assert holder.pid in [each.pid for each in client.holders("top").holders]
        holder.kill()
        holder.wait()
        assert client.cleanup().unmounted == ["top"]
        assert client.health().status == "ok"
