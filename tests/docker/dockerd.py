"""dockerd with the aufs driver, over a store that holds layers of somebody else."""

import hashlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
def dockerd(data: Path, run: Path) -> Iterator[Dockerd]:
    """A daemon, ready; `run` is an empty directory with a short name, for its sockets."""
    address = f"unix://{run}/s"
    containerd = [
        "containerd",
        "--address",
        f"{run}/c",
        "--root",
        f"{run}/r",
        "--state",
        f"{run}/t",
    ]
    # dockerd starts one itself, but waits for it no longer than an ordinary machine takes
    command = ["dockerd", "-s", "aufs", "--data-root", str(data), "--exec-root", f"{run}/e"]
    command += ["--containerd", f"{run}/c", "-p", f"{run}/pid", "-H", address]
    command += ["--bridge=none", "--iptables=false"]
    with _started(containerd, run), _started(command, run):
        yield Dockerd(data, address)


@contextmanager
def _started(command: Sequence[str], run: Path) -> Iterator[None]:
    """A process that says when it is ready as systemd has it (sd_notify(3))."""
    said = run / f"{command[0]}.log"
    address = f"{run}/{command[0]}.ready"
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
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(READY_WITHIN)
