"""What of the tests this machine can run, found out by trying, and why the rest is off.

Importing this moves the process into a private mount namespace, so that nothing a test mounts can
stay behind on the host. An ordinary user gets a user namespace first, as `make demo` does.
"""

import os
import shutil
import subprocess
from pathlib import Path

from aufsd.kernel import syscalls
from tests.crash.strace import untraceable
from tests.packages import without
from tests.systemd import box

ROOT_IN_HOST = os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == [
    "0",
    "0",
    "4294967295",
]


def _enter_namespace() -> str:
    """Why real mounts are off; "" if the run now stands in a mount namespace of its own."""
    try:
        if os.geteuid() == 0:
            syscalls.unshare(syscalls.CLONE_NEWNS)
        else:
            uid, gid = os.geteuid(), os.getegid()
            syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_SLAVE)
    except OSError as error:
        return f"no private mount namespace: {error}"
    return ""


def _userns() -> str:
    """user_namespaces(7): a process under chroot may make none; a sysctl may forbid it."""
    command = ["unshare", "--user", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip()


def _aufs() -> str:
    if "\taufs\n" in Path("/proc/filesystems").read_text():
        return ""
    return "this kernel has no aufs (make test-vm KERNEL=... runs this tier)"


def _dockerd() -> str:
    if shutil.which("dockerd") and shutil.which("containerd"):
        return ""
    return "needs a dockerd that has the aufs driver: docker.io of Debian 12"


def _docker() -> str:
    """Why not; the tests do not install it, for its package starts a dockerd of its own."""
    needed = ("dockerd", "docker", "containerd", "runc", "busybox")
    missing = [program for program in needed if not shutil.which(program)]
    if missing:
        return f"needs docker.io of Debian 12 and busybox-static ({', '.join(missing)} not found)"
    return "" if Path("/sys/fs/cgroup").is_mount() else "no cgroups, which dockerd needs"


def _deb() -> str:
    """It builds packages and roots for minutes, from the network, so it is asked for."""
    if not os.environ.get("AUFSD_DEB"):
        return "make test-deb runs this tier"
    if not list((Path(__file__).parents[1] / "build/deb").glob("aufsd_*.deb")):
        return "there are no packages in build/deb: make deb"
    return without("deb")


def _loop() -> str:
    return "" if os.access("/dev/loop-control", os.R_OK | os.W_OK) else "there are no loop devices"


def _fuse() -> str:
    return "" if os.access("/dev/fuse", os.R_OK | os.W_OK) else "/dev/fuse cannot be opened"


OFF: dict[str, str] = {"mounts": _enter_namespace()}
OFF["userns"] = OFF["mounts"] or _userns()
OFF["root"] = "" if ROOT_IN_HOST else "needs root, and not that of a user namespace"
OFF["service"] = OFF["mounts"] or OFF["root"]
OFF["systemd"] = OFF["service"] or without("systemd") or box.missing()
OFF["crash"] = OFF["service"] or without("crash") or untraceable()
OFF["deb"] = OFF["systemd"] or _deb()
OFF["aufs"] = OFF["mounts"] or _aufs()
OFF["dockerd"] = OFF["aufs"] or _dockerd()
OFF["docker"] = OFF["service"] or _docker()
OFF["oci"] = without("oci")
OFF["fuse"] = OFF["mounts"] or _fuse() or without("fuse")
OFF["btrfs"] = OFF["service"] or _loop() or without("btrfs")
OFF["ext4"] = OFF["service"] or _loop() or without("ext4")
OFF["blocks"] = without("blocks")
OFF["acl"] = without("acl")
OFF["bsdtar"] = without("bsdtar")
OFF["promtool"] = without("promtool")
