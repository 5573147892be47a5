"""Tiers: what this machine can run is found out by trying, said in the report header, and held to.

The whole run moves into a private mount namespace before any test, so that nothing a test mounts
can stay behind on the host. An ordinary user gets a user namespace first, as `make demo` does.
`AUFSD_REQUIRE="mounts service"` turns a tier that is off into an error; CI sets it.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd.kernel import syscalls
from tests.btrfs import btrfs_at
from tests.crash.strace import untraceable
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


def _aufs() -> str:
    if "\taufs\n" in Path("/proc/filesystems").read_text():
        return ""
    return "this kernel has no aufs (make test-vm KERNEL=... runs this tier)"


def _dockerd() -> str:
    if shutil.which("dockerd") and shutil.which("containerd"):
        return ""
    return "needs a dockerd that has the aufs driver: docker.io of Debian 12"


def _fuse() -> str:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no /dev/fuse that can be opened"
    return "" if shutil.which("fuse-overlayfs") else "fuse-overlayfs is not installed"


def _btrfs() -> str:
    """A loop device and mkfs.btrfs: a store needs a file system of that type."""
    if not os.access("/dev/loop-control", os.R_OK | os.W_OK):
        return "no loop devices"
    return "" if shutil.which("mkfs.btrfs") else "btrfs-progs is not installed"


OFF: dict[str, str] = {"mounts": _enter_namespace()}
OFF["root"] = "" if ROOT_IN_HOST else "needs root, and not that of a user namespace"
OFF["service"] = OFF["mounts"] or OFF["root"]
OFF["systemd"] = OFF["service"] or box.missing()
OFF["crash"] = OFF["service"] or untraceable()
OFF["aufs"] = OFF["mounts"] or _aufs()
OFF["dockerd"] = OFF["aufs"] or _dockerd()
OFF["oci"] = "" if shutil.which("skopeo") and shutil.which("umoci") else "needs skopeo and umoci"
OFF["fuse"] = OFF["mounts"] or _fuse()
OFF["btrfs"] = OFF["service"] or _btrfs()


def pytest_report_header() -> list[str]:
    return [
        "tier pure: on",
        *(f"tier {tier}: {'off, ' + why if why else 'on'}" for tier, why in OFF.items()),
    ]


def pytest_configure() -> None:
    # a shell's background jobs ignore it, and so would all that is started from here
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    required = os.environ.get("AUFSD_REQUIRE", "").split()
    missing = [f"{tier} ({OFF[tier]})" for tier in required if OFF[tier]]
    if missing:
        raise pytest.UsageError(f"AUFSD_REQUIRE asks for tiers that are off: {', '.join(missing)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for tier, why in OFF.items():
        if why and item.get_closest_marker(tier):
            pytest.skip(why)


@pytest.fixture(scope="session")
def btrfs_ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A btrfs for the whole run; make a directory of your own in it."""
    with btrfs_at(tmp_path_factory.mktemp("ground")) as ground:
        yield ground


@pytest.fixture
def on_btrfs(btrfs_ground: Path) -> Path:
    """A directory on btrfs, for one test."""
    made = btrfs_ground / f"{len(list(btrfs_ground.iterdir()))}"
    made.mkdir()
    return made
