"""The programs that we are measured against, where this machine has them."""

import os
import platform
import shutil
import subprocess
import timeit
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
    memory = Path("/proc/meminfo").read_text().splitlines()[0].split()[1]
    return {
        "processor": _processor(),
        "memory": f"{int(memory) >> 20} GiB",
        "kernel": platform.release(),
        "python": f"{platform.python_version()}, {_small_call() * 1e9:.0f} ns for a small function",
    }


def _processor() -> str:
    """How many of which; virtual machines tell no model by name, but the numbers of theirs."""
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        found[key.strip()] = value.strip()
    name = found.get("model name") or platform.processor()
    numbers = [f", {key} {found[key]}" for key in ("cpu family", "model") if key in found]
    return f"{os.cpu_count()} x {name}{''.join(numbers)}"


def _small_call() -> float:
    """Seconds. Two builds may differ in it by half and more, and in what we measure with it."""
    runs = timeit.repeat("f(1, 2)", "def f(a, b): return {'a': [a, b]}", number=20_000)
    return min(runs) / 20_000
