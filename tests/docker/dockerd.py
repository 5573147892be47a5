"""dockerd, with its own aufs driver over a store of somebody else's, or with a plugin of ours."""

import hashlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

READY_WITHIN = 600.0  # seconds; the machine may be an emulated one


@dataclass(frozen=True, slots=True)
class Dockerd:
    """A running daemon; `data` is its data root, in which aufs/ is the store."""

    data: Path
    address: str

    def __call__(self, *arguments: str) -> str:
        """Standard output of `docker`, which must succeed."""
        command = ["docker", "-H", self.address, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def layer_of(self, container: str) -> str:
        """The id of a container's topmost layer."""
        path = self.data / "image/aufs/layerdb/mounts" / container / "mount-id"
        return path.read_text()


def record(data: Path, layers: Sequence[tuple[str, str]]) -> str:
    """Tell Docker of layers, base first, as (id, digest of the diff); the id of their image.

    moby layer/filestore.go and image/fs.go; what is not there is only needed to push.
    """
    chain = ""
    for id, diff in layers:
        below = chain
        chain = sha256(f"{chain} {diff}") if chain else diff
        directory = data / "image/aufs/layerdb" / chain.replace(":", "/")
        directory.mkdir(parents=True)
        (directory / "cache-id").write_text(id)
        (directory / "diff").write_text(diff)
        (directory / "size").write_text("0")
        if below:
            (directory / "parent").write_text(below)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "created": "2020-01-01T00:00:00Z",
            "rootfs": {"type": "layers", "diff_ids": [diff for _, diff in layers]},
        }
    )
    image = sha256(config)
    path = data / "image/aufs/imagedb/content" / image.replace(":", "/")
    path.parent.mkdir(parents=True)
    path.write_text(config)
    return image


def sha256(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@contextmanager
def dockerd(data: Path, run: Path, driver: str = "aufs", *flags: str) -> Iterator[Dockerd]:
    """A daemon, ready; `run` is an empty directory with a short name, for its sockets."""
    with containerd(run), alone(data, run, driver, *flags) as made:
        yield made


@contextmanager
def alone(data: Path, run: Path, driver: str, *flags: str) -> Iterator[Dockerd]:
    """The same with a containerd that runs already."""
    with started(_command(data, run, driver, *flags), run):
        yield Dockerd(data, f"unix://{run}/s")


def _command(data: Path, run: Path, driver: str, *flags: str) -> list[str]:
    command = ["dockerd", "-s", driver, "--data-root", str(data), "--exec-root", f"{run}/e"]
    command += ["--containerd", f"{run}/c", "-p", f"{run}/pid", "-H", f"unix://{run}/s"]
    return [*command, "--bridge=none", "--iptables=false", *flags]


@contextmanager
def containerd(run: Path) -> Iterator[None]:
    """The containerd of a dockerd, which starts one itself but does not wait long for it."""
    command = [
        "containerd",
        "--address",
        f"{run}/c",
        "--root",
        f"{run}/r",
        "--state",
        f"{run}/t",
    ]
    with started(command, run):
        yield


@contextmanager
def started(command: Sequence[str], run: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that says when it is ready as systemd has it (sd_notify(3))."""
    name = Path(command[0]).name
    said = run / f"{name}.log"
    address = f"{run}/{name}.ready"
    with suppress(FileNotFoundError):
        os.unlink(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, said.open("wb") as log:
        ready.bind(address)
        ready.settimeout(0.1)
        environment = {**os.environ, "NOTIFY_SOCKET": address}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            for _ in range(int(READY_WITHIN / 0.1)):
                try:
                    if b"READY=1" in ready.recv(4096):
                        break
                except TimeoutError:
                    assert process.poll() is None, said.read_text()
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(READY_WITHIN)
