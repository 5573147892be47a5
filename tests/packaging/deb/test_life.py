"""The packages' whole life under each release's own systemd, by the packaged commands alone."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.deb.roots import CHECKOUT, root
from tests.systemd.box import Box

pytestmark = [pytest.mark.service, pytest.mark.systemd, pytest.mark.deb]

BUILT = CHECKOUT / "build/deb"
SUITES = os.environ.get("AUFSD_DEB", "").split() or ["bookworm"]
# a later version than any; dpkg --compare-versions
NEXT = "99.0"

# The store is on a tmpfs: the box's root, an overlay, cannot hold the upper directory of another.
HOOK = """
mkdir -p "$R/var/lib/aufsd"
mount -t tmpfs -o mode=755 store "$R/var/lib/aufsd"
# what minbase's apt would ask of a network
rm -f "$R/etc/apt/apt.conf.d/"*docker*
"""
# what a shell needs
SMALL = r"""
libraries=$(ldd /usr/bin/dash /usr/bin/cat | grep -o '/lib[^ ]*' | sort -u)
tar -cf /tmp/small.tar --dereference --transform 's,usr/bin/dash$,bin/sh,' \
    /usr/bin/dash /usr/bin/cat $libraries /etc/passwd
"""


class Machine:
    """A booted release. Keeps a transcript of what is done by hand in it."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.transcript = ""

    def __call__(self, command: str, status: int = 0) -> str:
        """What a shell's command says; AssertionError at another exit status."""
        done = self.box.run("bash", "-c", command, check=False, timeout=600)
        self.transcript += f"# {command}\n{done.stdout}"
        assert done.returncode == status, self.transcript
        return done.stdout

    def install(self, *packages: Path) -> str:
        """By apt, which finds no network and all it needs in its cache."""
        for package in packages:
            shutil.copy(package, self.box.path("/root"))
        names = " ".join(f"./{package.name}" for package in packages)
        apt = "DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends"
        return self(f"cd /root && {apt} {names}")

    def references(self) -> dict[str, int]:
        """Each layer's count, as `aufsctl mounts` says."""
        found = json.loads(self("aufsctl --json mounts"))
        return {mount["id"]: mount["references"] for mount in found["mounts"]}

    def mounted(self) -> list[str]:
        """The store's mounts, as the kernel says."""
        return self("grep -o ' /var/lib/aufsd/mnt/[^ ]*' /proc/mounts; :").split()


@pytest.fixture(scope="module")
def packages() -> list[Path]:
    """The packages that `make deb` built: the daemon's and the client's."""
    return [*BUILT.glob("aufsd_*.deb"), *BUILT.glob("aufsd-client_*.deb")]


@pytest.fixture(scope="module")
def upgraded(packages: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the daemon that is the same but for its version."""
    place = tmp_path_factory.mktemp("next")
    tree = place / "tree"
    subprocess.run(["dpkg-deb", "-R", str(packages[0]), str(tree)], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub("(?m)^Version: .*", f"Version: {NEXT}-1", control.read_text()))
    module = tree / "usr/lib/aufsd/aufsd/__init__.py"
    module.write_text(re.sub('__version__ = ".*"', f'__version__ = "{NEXT}"', module.read_text()))
    made = place / f"aufsd_{NEXT}-1.deb"
    build = ["dpkg-deb", "-Znone", "-b", str(tree), str(made)]
    subprocess.run(build, check=True, capture_output=True)
    return made


@pytest.fixture(params=SUITES)
def machine(request: pytest.FixtureRequest, packages: list[Path]) -> Iterator[Machine]:
    """A release that has booted, and has never seen aufsd."""
    suite = request.param
    with Box(HOOK, root=str(root(suite, packages))) as box:
        made = Machine(box)
        made("cat /etc/os-release | sed -n '/^PRETTY_NAME=/p'; systemctl --version | head -1")
        yield made
        (BUILT / f"{suite}.txt").write_text(made.transcript)


def test_lintian_finds_nothing_that_is_not_explained() -> None:
    [changes] = BUILT.glob("*.changes")
    done = subprocess.run(
        ["lintian", "--fail-on", "warning,error", str(changes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_install_use_upgrade_remove_and_purge(
    machine: Machine, packages: list[Path], upgraded: Path
) -> None:
    machine(SMALL)
    began = time.monotonic()
    machine.install(*packages)
    machine.transcript += f"== from apt to its end: {time.monotonic() - began:.1f} s\n"
    layer = machine("aufsctl load /tmp/small.tar").split()[-1]
    path = machine(f"aufsctl create work --parent {layer} && aufsctl get work").split()[-1]
    machine.transcript += f"== from apt to the first mount: {time.monotonic() - began:.1f} s\n"
    assert machine(f"cat {path}/etc/passwd").startswith("root:")

    is_what_the_pages_say(machine)
    assert "it runs\n" in machine(f"aufsctl run --rm {layer} -- /bin/sh -c 'echo it runs'")

    machine(f"echo kept >{path}/file; aufsctl get work")
    machine("systemctl restart aufsd")
    assert (machine.references(), machine.mounted()) == ({"work": 2}, [path])

    keeps_all_through_an_upgrade(machine, upgraded, path)

    said = machine("apt-get remove -y -qq aufsd")
    assert f"    {path}\n" in said
    assert "aufsd is stopped." in said
    units = "aufsd.service aufsd.socket aufsd-monitor.socket"
    assert set(machine(f"systemctl is-active {units}; :").split()) <= {"inactive", "unknown"}
    assert machine(f"cat {path}/file") == "kept\n"
    assert "max_jobs = 3" in machine("cat /etc/aufsd/aufsd.toml")
    assert machine("find /usr/lib/aufsd /lib/systemd/system -name '*aufsd*'; :").count("\n") <= 1

    # it goes on where it was
    machine.install(packages[0])
    assert machine.references() == {"work": 2}

    said = machine("apt-get purge -y -qq aufsd aufsd-client")
    assert f"    {path}\n" in said
    assert "The layers in /var/lib/aufsd stay" in said
    assert machine(f"cat {path}/file /var/lib/aufsd/diff/work/file") == "kept\nkept\n"
    machine("test ! -e /etc/aufsd && test ! -e /usr/lib/aufsd && test ! -e /usr/lib/aufsd-client")
    machine(f"umount {path}")


def is_what_the_pages_say(machine: Machine) -> None:
    """The daemon is well, its files are where they belong, and it starts with the host."""
    assert "the daemon is ok" in machine("aufsctl health")
    said = machine("aufsd --version; aufsctl version")
    versions = re.findall(r"(?m)^(aufsd|aufsctl) +([\d.]+)$", said)
    assert len(versions) == 3
    assert len({version for _, version in versions}) == 1
    units = "aufsd.service aufsd.socket aufsd-monitor.socket"
    assert machine(f"systemctl is-enabled {units}").split() == ["enabled"] * 3
    machine("systemctl is-enabled aufsd-textfile.timer", status=1)
    assert machine("stat -c '%a %U %G' /run/aufsd/aufsd.sock") == "660 root aufsd\n"
    assert machine("/usr/lib/nagios/plugins/check_aufsd").startswith("AUFSD OK")
    # the kernel calls it by its name
    assert machine("cat /proc/$(systemctl show -P MainPID aufsd)/comm") == "aufsd\n"
    assert "aufsctl" in machine("dpkg -L aufsd-client | grep man1")
    machine("python3 -c 'import sys; sys.version_info < (3, 11) or __import__(\"aufsd_client\")'")
    completes = ". /usr/share/bash-completion/completions/aufsctl && complete -p aufsctl"
    assert "_aufsctl_completion" in machine(completes)


def keeps_all_through_an_upgrade(machine: Machine, upgraded: Path, path: str) -> None:
    """Mounts, counts, the configuration and the very socket that calls wait in."""
    machine("sed -i '1i max_jobs = 3' /etc/aufsd/aufsd.toml")
    control = "stat -c '%i %n' /run/aufsd/aufsd.sock"
    before = machine(control)
    # a process that has a file of the layer open is not disturbed
    machine(f"systemd-run -q --unit=user sh -c 'exec 3<{path}/file; sleep 1000'")
    machine.install(upgraded)
    assert f"aufsd     {NEXT}\n" in machine("aufsctl version")
    assert machine("aufsd --version") == f"aufsd {NEXT}\n"
    assert (machine.references(), machine.mounted()) == ({"work": 2}, [path])
    assert machine(control) == before
    assert "the daemon is ok" in machine("aufsctl --socket /run/aufsd/monitor.sock health")
    assert "max_jobs = 3" in machine("cat /etc/aufsd/aufsd.toml")
    machine("systemctl is-active user; systemctl stop user")
