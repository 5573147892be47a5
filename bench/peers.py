"""The programs that we are measured against, where this machine has them."""

import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# name -> the Debian package that has it, and how it tells its version
_KNOWN = {
    "tar": ("tar", ("tar", "--version")),
    "containers-storage": ("containers-storage", ("containers-storage", "version")),
    "dockerd": ("docker.io", ("dockerd", "--version")),
}


@dataclass(frozen=True, slots=True)
class Peers:
    """What was found: name -> version. `missing` says of the others how to have them."""

    versions: dict[str, str]
    missing: dict[str, str]

    def __contains__(self, name: str) -> bool:
        return name in self.versions


def find() -> Peers:
    """Look for every peer."""
    versions, missing = {}, {}
    for name, (package, command) in _KNOWN.items():
        if shutil.which(command[0]) is None:
            missing[name] = f"{name} is not here; on Debian: apt-get install {package}"
        else:
            versions[name] = _version(package, command)
    return Peers(versions, missing)


def _version(package: str, command: tuple[str, ...]) -> str:
    asked = ("dpkg-query", "-W", "-f", "${Version}", package)
    for question in (asked, command):
        try:
            done = subprocess.run(question, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            continue
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip().splitlines()[0]
    return "of unknown version"


def machine() -> dict[str, str]:
    """The machine that a run was made on."""
    processors = Path("/proc/cpuinfo").read_text().splitlines()
    models = [
        line.partition(":")[2].strip() for line in processors if line.startswith("model name")
    ]
    memory = Path("/proc/meminfo").read_text().splitlines()[0].split()[1]
    return {
        "processor": f"{len(models)} x {models[0]}" if models else platform.processor(),
        "memory": f"{int(memory) >> 20} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
