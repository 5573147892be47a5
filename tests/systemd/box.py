"""A real systemd as PID 1 of a namespace, over an overlay of this host's own root, or of another.

Nothing is installed, and nothing of it reaches the host: the box has namespaces of its own for
processes, mounts, cgroups, network, IPC and the host's name, and ends with the test run. It is no
security boundary: its root has every right.
"""

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from contextlib import suppress
from pathlib import Path

SYSTEMD = "/lib/systemd/systemd"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BOOT_WITHIN = 60.0  # seconds
# on a host with both, cgroup2 lies here; systemd in the box is shown this one alone
_CGROUPS = Path(
    "/sys/fs/cgroup/unified" if os.path.ismount("/sys/fs/cgroup/unified") else "/sys/fs/cgroup"
)
_NAMESPACES = ("--mount", "--uts", "--ipc", "--pid", "--net", "--cgroup")

# Run by the first process of the namespaces. $1: a directory, $2: the root that the box's lies
# over, $3: the hook, a script that finds the box's root in R and the host's where it is; the rest
# is the new PID 1.
_INIT = r"""
set -eu
W=$1 LOWER=$2 HOOK=$3; shift 3
mount --make-rprivate /
mount -t tmpfs -o size=2g,mode=755 box "$W"
mkdir "$W/upper" "$W/work" "$W/root"
mount -t overlay -o "lowerdir=$LOWER,upperdir=$W/upper,workdir=$W/work" box-root "$W/root"
R=$W/root
# what is on the host and has no business here
rm -f "$R"/etc/systemd/system/*.wants/* "$R/etc/fstab"
for unit in systemd-journald-audit.socket sys-kernel-debug.mount sys-kernel-tracing.mount \
    sys-fs-fuse-connections.mount dev-hugepages.mount systemd-modules-load.service \
    systemd-remount-fs.service systemd-udevd.service systemd-udev-trigger.service \
    systemd-udevd-kernel.socket systemd-udevd-control.socket systemd-update-utmp.service; do
    ln -sf /dev/null "$R/etc/systemd/system/$unit"
done
: > "$R/etc/machine-id"
mount -t proc -o nosuid,nodev,noexec proc "$R/proc"
# systemd-sysctl would set the host's kernel
mount --bind "$R/proc/sys" "$R/proc/sys"
mount -o remount,bind,ro "$R/proc/sys"
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$R/sys"
mount -t cgroup2 -o rw,nosuid,nodev,noexec cgroup2 "$R/sys/fs/cgroup"
mount -t tmpfs -o mode=755,nosuid dev "$R/dev"
while read -r name major minor; do
    mknod -m 666 "$R/dev/$name" c "$major" "$minor"
done <<DEVICES
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
fuse 10 229
DEVICES
mkdir "$R/dev/pts" "$R/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$R/dev/pts"
ln -s pts/ptmx "$R/dev/ptmx"
ln -s /proc/self/fd "$R/dev/fd"
ln -s /proc/self/fd/0 "$R/dev/stdin"
ln -s /proc/self/fd/1 "$R/dev/stdout"
ln -s /proc/self/fd/2 "$R/dev/stderr"
mount -t tmpfs -o mode=1777,nosuid,nodev shm "$R/dev/shm"
mount -t tmpfs -o mode=755,nosuid,nodev run "$R/run"
mount -t tmpfs -o mode=1777,nosuid,nodev tmp "$R/tmp"
mkdir -p "$R/run/systemd" "$R/run/host"
echo box > "$R/run/systemd/container"
if [ -n "$HOOK" ]; then
    . "$HOOK"
fi
mkdir -p "$R/.host"
cd "$R"
pivot_root . .host
umount -l /.host
# in a container systemd leaves that to whoever made it
mount --make-rshared /
hostname box
exec env -i container=box PATH="$PATH" NOTIFY_SOCKET="${NOTIFY_SOCKET-}" "$@" </dev/null
"""


def missing() -> str:
    """Why no box can be booted here, found by making one without systemd; "" if one can."""
    if not os.access(SYSTEMD, os.X_OK):
        return f"there is no {SYSTEMD}"
    for command in ("unshare", "nsenter", "setpriv"):
        if shutil.which(command) is None:
            return f"there is no {command} (util-linux)"
    try:
        with _Place() as place:
            done = subprocess.run(
                [*place.command("/"), "", "/bin/true"],
                capture_output=True,
                text=True,
                timeout=BOOT_WITHIN,
                check=False,
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no box can be made: {error}"
    return f"no box can be made: {done.stderr.strip()}" if done.returncode else ""


class _Place:
    """A directory and a cgroup for one box."""

    def __init__(self) -> None:
        self.name = f"aufsd-box-{os.getpid()}-{time.monotonic_ns()}"
        self.directory = Path("/tmp") / self.name
        self.cgroup = _CGROUPS / self.name

    def __enter__(self) -> "_Place":
        (self.directory / "w").mkdir(parents=True)
        try:
            self.cgroup.mkdir()
        except OSError:
            shutil.rmtree(self.directory)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.directory)
        for directory, _, _ in os.walk(self.cgroup, topdown=False):
            # a cgroup is busy until its last process has been reaped
            for _ in range(200):
                try:
                    os.rmdir(directory)
                except OSError:
                    time.sleep(0.01)
                else:
                    break

    def command(self, root: str) -> list[str]:
        """What starts `_INIT` in this place. To be followed by the hook and the new PID 1."""
        # The cgroup is entered before the cgroup namespace is made, so that it is the box's root.
        # A run that is killed takes its box along: setpriv does it for unshare, unshare for PID 1.
        enter = 'echo $$ > "$1/cgroup.procs"; shift; exec "$@"'
        return [
            *("sh", "-c", enter, "sh", str(self.cgroup)),
            *("setpriv", "--pdeathsig=KILL"),
            *("unshare", *_NAMESPACES, "--fork", "--kill-child=KILL"),
            *("sh", "-c", _INIT, "sh", str(self.directory / "w"), root),
        ]


class Box:
    """A booted box over a root directory, which is only read.

    `hook` is a shell script that may put things below "$R" before the boot.
    """

    def __init__(self, hook: str = "", root: str = "/") -> None:
        self._hook = hook
        self._root = root
        self._place = _Place()
        self.boot_seconds = 0.0
        # PID 1 of the box, as the host numbers it
        self.pid = 0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def console(self) -> str:
        """What was written to the box's console."""
        return (self._place.directory / "console").read_text(errors="replace")

    def path(self, inside: str) -> str:
        """A path inside, as the host can open it."""
        return f"/proc/{self.pid}/root{inside}"

    def __enter__(self) -> "Box":
        began = time.monotonic()
        self._place.__enter__()
        try:
            self._boot()
        except BaseException:
            self.__exit__()
            raise
        self.boot_seconds = time.monotonic() - began
        return self

    def _boot(self) -> None:
        directory = self._place.directory
        notify = str(directory / "notify")
        hook = directory / "hook"
        # systemd as PID 1 of a container says when it is up (systemd(1), $NOTIFY_SOCKET)
        hook.write_text(
            f": > $R/run/host/notify\nmount --bind {notify} $R/run/host/notify\n{self._hook}"
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            ready.bind(notify)
            with (directory / "console").open("wb") as console:
                self.process = subprocess.Popen(
                    [
                        *(*self._place.command(self._root), str(hook)),
                        *(SYSTEMD, "--unit=basic.target", "--show-status=yes"),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    env={"PATH": PATH, "NOTIFY_SOCKET": "/run/host/notify"},
                    start_new_session=True,
                )
            self._wait_until_ready(ready)

    def _wait_until_ready(self, ready: socket.socket) -> None:
        assert self.process is not None
        until = time.monotonic() + BOOT_WITHIN
        ended = os.pidfd_open(self.process.pid)
        try:
            while (left := until - time.monotonic()) > 0:
                readable, _, _ = select.select([ready.fileno(), ended], [], [], left)
                if ready.fileno() in readable:
                    line, ancillary, _, _ = ready.recvmsg(4096, socket.CMSG_SPACE(12))
                    # the sender's pid comes translated into our own numbers (unix(7))
                    self.pid = struct.unpack("iII", ancillary[0][2])[0]
                    if b"READY=1" in line.split():
                        return
                elif readable:
                    raise RuntimeError(f"the box ended: {self.console}")
        finally:
            os.close(ended)
        raise TimeoutError(f"the box is not up after {BOOT_WITHIN} s: {self.console}")

    def __exit__(self, *_: object) -> None:
        """Halt it; kill it if that takes long."""
        if self.process is not None:
            if self.pid:
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGRTMIN + 3)
            else:
                self.process.kill()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                # unshare's child, PID 1, goes with it, and with that the whole namespace
                self.process.kill()
                self.process.wait()
        self._place.__exit__()

    def run(
        self, *command: str, check: bool = True, timeout: float = 60.0, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root. Its errors are in its output; AssertionError if it fails.

        `check` False: whatever its exit status.
        """
        done = subprocess.run(
            [
                *(
                    "nsenter",
                    "-t",
                    str(self.pid),
                    "-m",
                    "-r",
                    "-w",
                    "-u",
                    "-i",
                    "-n",
                    "-p",
                    "-C",
                    "--",
                ),
                *("env", "-i", f"PATH={PATH}", "SYSTEMD_PAGER=", "LC_ALL=C.UTF-8", *command),
            ],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            input=stdin,
            timeout=timeout,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"{command}: {done.returncode}: {done.stdout}"
        return done

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        """Run systemctl inside; what it says."""
        return self.run("systemctl", "--no-pager", *arguments, check=check).stdout

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit."""
        said = self.systemctl("show", unit, f"--property={','.join(properties)}")
        return dict(line.split("=", 1) for line in said.splitlines())

    def journal(self, unit: str) -> str:
        """What a unit logged, message by message."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit).stdout
