"""One box with aufsd installed for all tests here, and the units in a fresh state for each."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from aufsd_client import Client
from tests.systemd.box import Box

CHECKOUT = Path(__file__).parents[2]
CONTROL, MONITOR = "/run/aufsd/aufsd.sock", "/run/aufsd/monitor.sock"

# The programs are the checkout's own, by the interpreter of this run; the rest is what
# `make install` puts in place. The store is on a tmpfs: the box's root, an overlay, cannot hold the
# upper directory of another.
_HOOK = """
for place in {checkout} {prefix}; do
    mkdir -p "$R$place"
    mount --bind "$place" "$R$place"
    mount -o remount,bind,ro "$R$place"
done
mkdir -p "$R/var/lib/aufsd"
mount -t tmpfs -o mode=755 store "$R/var/lib/aufsd"
cp -a {installed}/. "$R/"
mkdir -p "$R/usr/local/bin"
for program in aufsd aufsd_client.cli; do
    name=$(echo $program | sed s/aufsd_client.cli/aufsctl/)
    cat >"$R/usr/local/bin/$name" <<LAUNCHER
#!/bin/sh
PYTHONPATH={checkout}:{checkout}/client PYTHONDONTWRITEBYTECODE=1 \\
    exec {python} -m $program "\\$@"
LAUNCHER
    chmod 755 "$R/usr/local/bin/$name"
done
# a crash is not waited out
mkdir -p "$R/etc/systemd/system/aufsd.service.d"
printf '[Service]\\nRestartSec=20ms\\n' >"$R/etc/systemd/system/aufsd.service.d/restart.conf"
systemd-sysusers --root="$R"
systemd-tmpfiles --root="$R" --create --prefix=/run/aufsd
"""

_RESET = """
systemctl stop aufsd.socket aufsd-monitor.socket aufsd.service
grep -o ' /var/lib/aufsd/mnt/[^ ]*' /proc/mounts | xargs -r umount
rm -rf /var/lib/aufsd/* /var/lib/aufsd/.aufsd /etc/aufsd /run/aufsd/mounts.journal
rm -rf /run/systemd/system/aufsd*
systemctl daemon-reload
systemctl reset-failed
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make install-files` makes, below a directory."""
    place = tmp_path_factory.mktemp("installed")
    # it is laid over the box's root, mode and all
    place.chmod(0o755)
    # by the interpreter of this run, and not by one that make would install
    make = ("make", "-o", ".venv/installed", f"BIN={Path(sys.executable).parent}")
    done = subprocess.run(
        [*make, "install-files", f"DESTDIR={place}"],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT}/client"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="session")
def booted(installed: Path) -> Iterator[Box]:
    """A box with the units in place and nothing started."""
    hook = _HOOK.format(
        checkout=shlex.quote(str(CHECKOUT)),
        prefix=shlex.quote(sys.prefix),
        python=shlex.quote(sys.executable),
        installed=shlex.quote(str(installed)),
    )
    with Box(hook) as box:
        yield box


@pytest.fixture
def box(booted: Box) -> Iterator[Box]:
    """The box; afterwards nothing runs, nothing is mounted, and the store is empty."""
    yield booted
    booted.run("sh", "-ec", _RESET)


Connect = Callable[..., Client]


@pytest.fixture
def connect(box: Box) -> Iterator[Connect]:
    """Makes clients from outside: their pid means nothing inside, and their uid is root."""
    with ExitStack() as stack:
        yield lambda socket=CONTROL: stack.enter_context(Client(box.path(socket), timeout=30))


def python(box: Box, script: str) -> str:
    """Run a script inside, with a client at hand; what it prints."""
    lines = "from aufsd_client import Client\nclient = Client(timeout=30)\n"
    path = f"PYTHONPATH={CHECKOUT}/client"
    return box.run("env", path, sys.executable, "-W", "ignore", "-c", lines + script).stdout


def wait_until(holds: Callable[[], bool]) -> None:
    """Look until something holds that nobody tells."""
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until, "it never came to hold"
        time.sleep(0.02)


def drop_in(box: Box, *lines: str, unit: str = "aufsd.service") -> None:
    """Add to a unit, for one test."""
    directory = Path(box.path(f"/run/systemd/system/{unit}.d"))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "test.conf").write_text("\n".join(lines) + "\n")
    box.systemctl("daemon-reload")


def configure(box: Box, text: str) -> None:
    """Write aufsd.toml."""
    directory = Path(box.path("/etc/aufsd"))
    directory.mkdir(exist_ok=True)
    (directory / "aufsd.toml").write_text(text)
