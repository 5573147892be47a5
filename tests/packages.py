"""Debian's packages that the tests and the demo use: which, for what, and how they get here.

    python -m tests.packages setup | tests | demo | TIER

installs those that are missing, as root and by apt, and says which in one line. What cannot be
installed is named, and that is no failure: tests that need it are left out (tests/tiers.py), and
the demo does without. Of the standard library alone, since it runs before anything is installed.

`APT=` in the environment, empty, installs nothing.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# a virtual environment's own, where `extract` puts programs
_BIN = Path(os.environ.get("VENV") or sys.prefix).absolute() / "bin"
# where programs are looked for; the PATH of an ordinary user has no sbin
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin", str(_BIN)))


@dataclass(frozen=True)
class Package:
    """A package, a program of it that tells whether it is there, and the tier that needs it."""

    name: str
    program: str
    tier: str
    # whether the program alone is taken out of it, since it would start a server
    extract: bool = False

    @property
    def present(self) -> bool:
        """Whether it is there, by whatever way it came."""
        if self.program == "python -m venv":
            return importlib.util.find_spec("ensurepip") is not None
        return shutil.which(self.program, path=PATH) is not None


PACKAGES = (
    Package("python3-venv", "python -m venv", "setup"),
    Package("debootstrap", "debootstrap", "demo"),
    Package("acl", "setfacl", "acl"),
    Package("bubblewrap", "bwrap", "blocks"),
    Package("btrfs-progs", "mkfs.btrfs", "btrfs"),
    Package("e2fsprogs", "mkfs.ext4", "ext4"),
    Package("fuse-overlayfs", "fuse-overlayfs", "fuse"),
    Package("jq", "jq", "blocks"),
    Package("libarchive-tools", "bsdtar", "bsdtar"),
    Package("procps", "pgrep", "systemd"),
    Package("prometheus", "promtool", "promtool", extract=True),
    Package("skopeo", "skopeo", "oci"),
    Package("socat", "socat", "blocks"),
    Package("debootstrap", "debootstrap", "deb"),
    Package("buildah", "buildah", "deb"),
    Package("crun", "crun", "deb"),
    Package("podman", "podman", "deb"),
    Package("debhelper", "dh", "deb"),
    Package("dh-python", "dh_python3", "deb"),
    Package("lintian", "lintian", "deb"),
    Package("python3-pip", "/usr/bin/pip3", "deb"),
    Package("strace", "strace", "crash"),
    Package("systemd", "/lib/systemd/systemd", "systemd"),
    Package("umoci", "umoci", "oci"),
)


def missing(*tiers: str) -> list[Package]:
    """Those that these tiers need and that are not there."""
    return [package for package in PACKAGES if package.tier in tiers and not package.present]


def named(packages: Sequence[Package]) -> str:
    """Their names, for a sentence."""
    return " ".join(package.name for package in packages)


def without(tier: str) -> str:
    """Why a tier is off for want of packages; "" if it is not."""
    lacking = missing(tier)
    return f"needs of Debian's packages: {named(lacking)}" if lacking else ""


# --- Installing -----------------------------------------------------------------------------------


def install(*tiers: str) -> None:
    """Install what is missing, if that can be done here; say what is, and what is not."""
    wanted = missing(*tiers)
    apt = shutil.which(os.environ.get("APT", "apt-get"), path=PATH)
    if not wanted:
        return
    if os.geteuid() != 0 or apt is None:
        why = "this machine has no apt" if apt is None else "only root can install"
        print(f"missing, and {why}: {named(wanted)}")
        return
    print(f"installing Debian's packages: {named(wanted)}", flush=True)
    said = _get(apt, wanted)
    if missing(*tiers):
        # the lists of packages may be empty, or old
        said = _apt(apt, "update") or _get(apt, missing(*tiers))
    if lacking := missing(*tiers):
        print(f"not installed: {named(lacking)}: {said or 'apt says nothing'}")


def _get(apt: str, packages: Sequence[Package]) -> str:
    """Try; what went wrong."""
    # what this release does not have must not keep the others out
    known = [package for package in packages if _run("apt-cache", "show", package.name)[0] == 0]
    whole = [package.name for package in known if not package.extract]
    said = [_apt(apt, "install", "--no-install-recommends", "--no-upgrade", *whole)]
    importlib.invalidate_caches()
    said += [_extract(apt, package) for package in known if package.extract]
    unknown = [package for package in packages if package not in known]
    said += [f"apt knows no {named(unknown)}"] if unknown else []
    return "; ".join(filter(None, said))


def _extract(apt: str, package: Package) -> str:
    """One program out of a package into the virtual environment; what went wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        if said := _apt(apt, "download", package.name, cwd=scratch):
            return said
        [archive] = Path(scratch).glob("*.deb")
        status, said = _run("dpkg-deb", "--extract", str(archive), f"{scratch}/all")
        if status:
            return said
        _BIN.mkdir(parents=True, exist_ok=True)
        shutil.move(f"{scratch}/all/usr/bin/{package.program}", _BIN / package.program)
    return ""


def _apt(apt: str, *arguments: str, cwd: str | None = None) -> str:
    """Run it; "" or the line in which it says what went wrong."""
    patience = ("Acquire::Retries=1", "Acquire::http::Timeout=30", "DPkg::Lock::Timeout=300")
    options = [word for option in patience for word in ("-o", option)]
    status, said = _run(apt, "-qq", "-y", *options, *arguments, cwd=cwd)
    return said if status else ""


def _run(*command: str, cwd: str | None = None) -> tuple[int, str]:
    """The exit status, and the last line that was said."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PATH": PATH, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, (done.stdout.strip().splitlines() or [f"status {done.returncode}"])[-1]


def main() -> None:
    """What the command is told to install: for one of the three, or for a tier of its own."""
    [what] = sys.argv[1:]
    tiers = {package.tier for package in PACKAGES} - {"setup", "demo", "deb"}
    install(*(tiers if what == "tests" else {what}))


if __name__ == "__main__":
    main()
