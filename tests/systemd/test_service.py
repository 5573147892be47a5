"""The units under a real systemd: started, activated, killed, hung, reloaded, stopped."""

import io
import os
import stat
import tarfile
import threading
from pathlib import Path

import pytest

from aufsd_client import Client
from aufsd_client.errors import AufsdError, InvalidParams, PermissionDenied, ShuttingDown
from aufsd_client.wire import ConnectionLost
from tests.daemon import eventually
from tests.systemd.box import Box
from tests.systemd.conftest import (
    CONTROL,
    MONITOR,
    Connect,
    configure,
    drop_in,
    python,
    wait_until,
)

pytestmark = [pytest.mark.service, pytest.mark.systemd]

SERVICE = "aufsd.service"


def start(box: Box, connect: Connect) -> Client:
    """Start all, with a layer that can be mounted; a client."""
    box.systemctl("start", "aufsd.socket", "aufsd-monitor.socket", SERVICE)
    made = connect()
    made.create("base")
    made.create("top", parent="base")
    return made


def main_pid(box: Box) -> int:
    return int(box.show(SERVICE, "MainPID")["MainPID"])


def status(box: Box) -> str:
    return box.show(SERVICE, "StatusText")["StatusText"]


def processes(box: Box) -> set[int]:
    """What runs in the service's cgroup."""
    group = box.show(SERVICE, "ControlGroup")["ControlGroup"]
    if not group:
        return set()
    listed = box.run("cat", f"/sys/fs/cgroup{group}/cgroup.procs", check=False).stdout
    return {int(pid) for pid in listed.split() if pid.isdigit()}


def mounted(box: Box) -> list[str]:
    """Layers that are mounted in the namespace of PID 1, which is everybody's."""
    rows = Path(f"/proc/{box.pid}/mountinfo").read_text().splitlines()
    points = [row.split()[4] for row in rows]
    return [point.rsplit("/", 1)[1] for point in points if point.startswith("/var/lib/aufsd/mnt/")]


def archive() -> bytes:
    """A tar with what a confined service may be kept from making."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, mode, device in (
            ("set-id", tarfile.REGTYPE, 0o6755, (0, 0)),
            ("char", tarfile.CHRTYPE, 0o600, (10, 200)),
            ("block", tarfile.BLKTYPE, 0o600, (7, 3)),
            ("fifo", tarfile.FIFOTYPE, 0o600, (0, 0)),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = kind, mode
            entry.uid, entry.gid = 1234, 5678
            entry.devmajor, entry.devminor = device
            tar.addfile(entry)
        entry = tarfile.TarInfo("capable")
        entry.pax_headers = {
            "SCHILY.xattr.security.capability": (b"\x01\0\0\x02\0\x04\0\0" + bytes(12)).decode(
                "latin-1"
            )
        }
        tar.addfile(entry)
        tar.addfile(tarfile.TarInfo(".wh.gone"))
    return buffer.getvalue()


# --- the files ------------------------------------------------------------------------------------


def test_systemd_finds_no_fault_in_the_units(box: Box) -> None:
    units = (
        *("aufsd.service", "aufsd.socket", "aufsd-monitor.socket"),
        *("aufsd-textfile.service", "aufsd-textfile.timer"),
    )
    # unknown keys and bad values are lines on standard error, and no exit status
    assert box.run("systemd-analyze", "verify", "--man=no", *units).stdout == ""


def test_the_service_is_exposed_as_little_as_is_written_down(box: Box) -> None:
    unit = "/usr/local/lib/systemd/system/aufsd.service"
    box.run("systemd-analyze", "security", "--offline=true", "--threshold=55", unit)


def test_enabling_the_service_enables_its_sockets(box: Box) -> None:
    box.systemctl("enable", SERVICE)
    try:
        enabled = box.systemctl("is-enabled", SERVICE, "aufsd.socket", "aufsd-monitor.socket")
        assert enabled.split() == ["enabled"] * 3
    finally:
        box.systemctl("disable", SERVICE, "aufsd.socket", "aufsd-monitor.socket")


# --- start ----------------------------------------------------------------------------------------


def test_it_is_ready_when_systemctl_says_so_and_tells_how_it_is(box: Box, connect: Connect) -> None:
    box.systemctl("start", SERVICE)
    assert connect().list().layers == []
    assert status(box) == "overlay: 0 layers, 0 mounts, 0 references, 0 archives running"
    assert box.show(SERVICE, "ActiveState", "SubState") == {
        "ActiveState": "active",
        "SubState": "running",
    }


def test_the_sockets_are_of_the_modes_and_the_group_of_the_contract(box: Box) -> None:
    box.systemctl("start", "aufsd.socket", "aufsd-monitor.socket")
    listed = box.run("stat", "-c", "%F %a %U %G %n", CONTROL, MONITOR, "/run/aufsd").stdout
    assert listed.splitlines() == [
        f"socket 660 root aufsd {CONTROL}",
        f"socket 666 root root {MONITOR}",
        "directory 755 root root /run/aufsd",
    ]


@pytest.mark.parametrize("socket", [CONTROL, MONITOR])
def test_a_call_that_comes_before_the_daemon_starts_it_and_is_answered(
    box: Box, connect: Connect, socket: str
) -> None:
    box.systemctl("start", "aufsd.socket", "aufsd-monitor.socket")
    assert box.show(SERVICE, "ActiveState")["ActiveState"] == "inactive"
    assert connect(socket).version().backend == "overlay"
    assert box.show(SERVICE, "ActiveState")["ActiveState"] == "active"


def test_a_configuration_that_cannot_be_used_is_said_once_and_not_tried_again(
    box: Box, connect: Connect
) -> None:
    configure(box, "max_jobs = 0\n")
    assert "failed" in box.systemctl("start", SERVICE, check=False)
    found = box.show(SERVICE, "ExecMainStatus", "NRestarts", "Result", "ActiveState")
    assert found == {
        "ExecMainStatus": "2",
        "NRestarts": "0",
        "Result": "exit-code",
        "ActiveState": "failed",
    }
    assert "max_jobs = 0: must be at least 1" in box.journal(SERVICE)


def test_a_socket_unit_with_another_name_is_a_mistake_that_is_said(box: Box) -> None:
    drop_in(box, "[Socket]", "FileDescriptorName=contrl", unit="aufsd.socket")
    drop_in(box, "[Service]", "Restart=no")
    box.systemctl("start", "aufsd.socket")
    assert "failed" in box.systemctl("start", SERVICE, check=False)
    assert "a socket named 'contrl'" in box.journal(SERVICE)


# --- what it does ---------------------------------------------------------------------------------


def test_a_mount_of_the_service_is_a_mount_of_the_host(box: Box, connect: Connect) -> None:
    got = start(box, connect).get("top")
    assert mounted(box) == ["top"]
    box.run("touch", f"{got.path}/written-by-another-process")
    assert "written-by-another-process" in os.listdir(box.path("/var/lib/aufsd/diff/top"))
    unit = box.run("systemd-escape", "--path", "--suffix=mount", got.path).stdout.strip()
    wait_until(lambda: box.show(unit, "ActiveState")["ActiveState"] == "active")


def test_every_operation_works_within_what_the_unit_allows(box: Box, connect: Connect) -> None:
    made = start(box, connect)
    made.apply_diff("base", archive())
    content = Path(box.path("/var/lib/aufsd/diff/base"))
    assert stat.S_IMODE((content / "set-id").stat().st_mode) == 0o6755
    assert ((content / "char").stat().st_rdev, (content / "block").stat().st_rdev) == (
        os.makedev(10, 200),
        os.makedev(7, 3),
    )
    assert (content / "set-id").stat().st_uid == 1234
    assert len(os.getxattr(content / "capable", "security.capability")) == 20
    written = bytearray()
    made.diff("base", written)
    with tarfile.open(fileobj=io.BytesIO(bytes(written))) as tar:
        assert {"set-id", "char", "block", "fifo", "capable", ".wh.gone"} <= set(tar.getnames())
    assert made.convert("base", "aufs").converted
    got = made.get("top")
    assert not made.check("", deep=True).problems
    # a process of another user, in a mount namespace of its own
    script = f"cd {got.path} && exec setpriv --reuid=1234 --clear-groups sleep 1000"
    box.run(
        *("systemd-run", "--quiet", "--unit=user-of-top", "-p", "PrivateTmp=yes"),
        *("sh", "-c", script),
    )
    try:
        pid = int(box.show("user-of-top", "MainPID")["MainPID"])
        wait_until(lambda: box.run("readlink", f"/proc/{pid}/cwd").stdout.strip() == got.path)
        uses = {holder.pid: holder.uses for holder in made.holders("top").holders}
        assert "cwd" in uses[pid]
    finally:
        box.systemctl("stop", "user-of-top")


def test_the_owner_of_a_store_for_containers_is_left_alone(box: Box, connect: Connect) -> None:
    # StateDirectory= would give the whole tree to root at the next start, since its top is not
    span = "[{container_id = 0, host_id = 100000, size = 65536}]"
    configure(box, f"uid_maps = {span}\ngid_maps = {span}\n")
    start(box, connect).apply_diff("base", archive())
    box.systemctl("restart", SERVICE)
    found = os.stat(box.path("/var/lib/aufsd/diff/base/set-id"))
    assert (found.st_uid, found.st_gid) == (101234, 105678)


def test_a_process_that_the_daemon_cannot_see_cannot_hold(box: Box, connect: Connect) -> None:
    made = start(box, connect)
    with pytest.raises(InvalidParams, match="a process that the daemon can see"):
        made.get("top", hold="process")
    assert made.get("top").references == 1
    script = "import os, time\nclient.get('top', hold='process')\nprint(os.getpid())\n"
    pid = python(box, script).strip()
    # one that it can see does, and puts when it ends
    wait_until(lambda: len(made.mounts().mounts[0].holders) == 1)
    assert f'"pid":{pid}' in box.journal(SERVICE)


# --- restarts -------------------------------------------------------------------------------------


def test_a_daemon_that_is_killed_comes_back_with_its_mounts_and_counts(
    box: Box, connect: Connect
) -> None:
    start(box, connect).get("top")
    before = main_pid(box)
    box.systemctl("kill", "--signal=KILL", "--kill-who=main", SERVICE)
    # waits in the socket's queue until the next daemon takes it
    assert connect().get("top").references == 2
    assert mounted(box) == ["top"]
    assert main_pid(box) != before
    assert box.show(SERVICE, "NRestarts")["NRestarts"] == "1"
    # closed with the daemon that was killed, and opened with the next
    assert connect(MONITOR).health().status == "ok"


def test_a_daemon_that_hangs_is_killed_by_the_watchdog_and_comes_back(
    box: Box, connect: Connect
) -> None:
    drop_in(box, "[Service]", "WatchdogSec=1")
    start(box, connect).get("top")
    box.systemctl("kill", "--signal=STOP", "--kill-who=main", SERVICE)
    assert connect().get("top").references == 2
    assert mounted(box) == ["top"]
    assert "Watchdog timeout" in box.journal(SERVICE)


def test_a_daemon_that_works_is_left_alone_by_the_watchdog(box: Box, connect: Connect) -> None:
    drop_in(box, "[Service]", "WatchdogSec=1")
    start(box, connect)
    fed = "WatchdogTimestampMonotonic"
    first = int(box.show(SERVICE, fed)[fed])
    wait_until(lambda: int(box.show(SERVICE, fed)[fed]) > first + 1_500_000)
    assert box.show(SERVICE, "NRestarts")["NRestarts"] == "0"


def test_stopping_leaves_mounts_and_starting_goes_on_with_them(box: Box, connect: Connect) -> None:
    start(box, connect).get("top")
    box.systemctl("stop", SERVICE)
    assert mounted(box) == ["top"]
    assert processes(box) == set()
    box.systemctl("start", SERVICE)
    made = connect()
    assert made.get("top").references == 2
    assert (made.put("top").references, made.put("top").mounted) == (1, False)
    assert mounted(box) == []


def test_a_poll_does_not_start_a_daemon_that_was_stopped(box: Box, connect: Connect) -> None:
    start(box, connect)
    box.systemctl("stop", SERVICE)
    # the service's stop has its socket stopped too, in a job of its own that nobody waits for
    eventually(lambda: not os.path.exists(box.path(MONITOR)))
    assert os.path.exists(box.path(CONTROL))


def test_a_restart_refuses_no_connection_and_says_of_each_call_how_it_ended(
    box: Box, connect: Connect
) -> None:
    start(box, connect)
    outcomes: list[object] = []
    restarted = threading.Event()

    def call() -> None:
        with connect() as made:
            # the last call begins after the restart
            last = False
            while not last:
                last = restarted.is_set()
                try:
                    outcomes.append(made.exists("top").exists)
                except (ShuttingDown, ConnectionLost) as error:
                    # on a connection of the old daemon; a new one waits in the socket's queue
                    outcomes.append(type(error).__name__)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        box.systemctl("restart", SERVICE)
    finally:
        restarted.set()
        caller.join()
    assert set(outcomes) <= {True, "ShuttingDown", "ConnectionLost"}
    assert outcomes[-1] is True


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_no_child_is_left_when_the_daemon_ends_in_the_middle_of_an_archive(
    box: Box, connect: Connect, how: str
) -> None:
    configure(box, "drain_timeout = 0.1\n")
    made = start(box, connect)
    read_end, write_end = os.pipe()
    ended = threading.Event()

    def apply() -> None:
        try:
            with os.fdopen(read_end, "rb") as source:
                made.apply_diff("base", source)
        except (AufsdError, OSError):
            ended.set()

    applying = threading.Thread(target=apply)
    applying.start()
    with os.fdopen(write_end, "wb") as out:
        out.write(archive()[:2048])
        out.flush()
        wait_until(lambda: len(connect().status().jobs) == 1)
        before = processes(box)
        assert len(before) > 1
        if how == "stop":
            box.systemctl("stop", SERVICE)
            assert processes(box) == set()
        else:
            box.systemctl("kill", "--signal=KILL", "--kill-who=main", SERVICE)
        applying.join()
    assert ended.is_set()
    box.systemctl("start", SERVICE)
    assert connect().diff_size("base").size == 0
    assert not processes(box) & before
    assert os.listdir(box.path("/var/lib/aufsd/.aufsd/staging")) == []


@pytest.mark.fuse
def test_what_serves_a_mount_outlives_the_daemon(box: Box, connect: Connect) -> None:
    configure(box, 'backend = "fuse-overlayfs"\n')
    path = start(box, connect).get("top").path
    box.run("sh", "-c", f"echo kept >{path}/file")
    serving = box.run("pgrep", "fuse-overlayfs").stdout
    box.systemctl("restart", SERVICE)
    assert box.run("cat", f"{path}/file").stdout == "kept\n"
    box.systemctl("kill", "--signal=KILL", "--kill-who=main", SERVICE)
    assert connect().get("top").references == 2
    assert box.run("cat", f"{path}/file").stdout == "kept\n"
    assert box.run("pgrep", "fuse-overlayfs").stdout == serving
    with connect() as made:
        made.put("top")
        assert not made.put("top").mounted
    wait_until(lambda: box.run("pgrep", "fuse-overlayfs", check=False).returncode == 1)


# --- reload ---------------------------------------------------------------------------------------


def test_a_reload_takes_new_limits_and_says_what_needs_a_restart(
    box: Box, connect: Connect
) -> None:
    start(box, connect)
    before = main_pid(box)
    configure(box, 'change_users = ["root"]\nmax_jobs = 7\n')
    box.systemctl("reload", SERVICE)
    wait_until(lambda: status(box).endswith("a restart is needed for max_jobs"))
    script = "import os; os.setgroups([]); os.setgid(GROUP); os.setuid(1234)\n"
    group = box.run("stat", "-c", "%g", CONTROL).stdout.strip()
    asked = python(
        box,
        script.replace("GROUP", group)
        + "print(client.exists('top').exists)\n"
        + "try: client.create('more')\nexcept Exception as error: print(type(error).__name__)",
    )
    assert asked.split() == ["True", PermissionDenied.__name__]
    assert main_pid(box) == before


def test_a_reload_of_a_bad_file_changes_nothing_and_says_so(box: Box, connect: Connect) -> None:
    start(box, connect)
    configure(box, "max_jobs = 'many'\n")
    box.systemctl("reload", SERVICE)
    wait_until(lambda: "the new configuration was not taken: /etc/aufsd/aufsd.toml" in status(box))
    assert connect().exists("top")
    assert box.show(SERVICE, "ActiveState")["ActiveState"] == "active"


# --- monitoring -----------------------------------------------------------------------------------


def test_the_plugin_and_the_textfile_follow_the_service(box: Box, connect: Connect) -> None:
    plugin, collected = "/usr/local/lib/nagios/plugins/check_aufsd", "/var/lib/prometheus"
    box.run("mkdir", "-p", f"{collected}/node-exporter")
    written = Path(box.path(f"{collected}/node-exporter/aufsd.prom"))
    start(box, connect)
    assert box.run(plugin).stdout.startswith("AUFSD OK - ")
    box.systemctl("start", "aufsd-textfile.service")
    assert "aufsd_layers 2\n" in written.read_text()
    box.systemctl("stop", SERVICE)
    # neither of them starts the daemon that was stopped
    stopped = box.run(plugin, check=False)
    assert stopped.returncode == 2
    assert "aufsd does not run" in stopped.stdout
    box.systemctl("start", "aufsd-textfile.service")
    assert written.read_text().endswith("aufsd_up 0\n")
    assert box.show(SERVICE, "ActiveState")["ActiveState"] == "inactive"
