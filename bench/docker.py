"""dockerd with overlay2, through its API: a container's root file system made, mounted, removed.

There is no call that only mounts. A HEAD of a path in a container that is not running mounts its
root, looks, and unmounts; that is the nearest to `get` and `put`.
"""

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from bench.archives import grow, pack
from bench.daemon import Line, daemon, request, require_result
from bench.figures import Outcome, alone, compare
from bench.harness import Bench, Case, interleaved, typical

_UP_WITHIN = 60.0  # seconds
_BATCH = 5


class Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket; kept open, as the daemon's other clients do."""

    def __init__(self, path: Path) -> None:
        super().__init__("docker")
        self.path = path

    def connect(self) -> None:
        """Reach the socket in place of the host."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self.path))

    def ask(self, method: str, path: str, body: object = None) -> dict[str, object]:
        """One call; anything but success raises."""
        sent = body if isinstance(body, bytes) else json.dumps(body) if body else None
        headers = {"Content-Type": "application/json"} if isinstance(sent, str) else {}
        self.request(method, path, sent, headers)
        answer = self.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"dockerd: {method} {path}: {answer.status} {text!r}")
        found: dict[str, object] = json.loads(text) if text.startswith(b"{") else {}
        return found


@contextmanager
def engine(directory: Path) -> Iterator[Connection]:
    """dockerd of our own: no network, no sockets or state but in `directory`."""
    directory.mkdir()
    command = [
        *("dockerd", "--storage-driver", "overlay2", "--host", f"unix://{directory}/socket"),
        *("--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec"),
        *("--pidfile", f"{directory}/pid", "--bridge=none", "--iptables=false"),
        *("--ip6tables=false", "--ip-forward=false", "--ip-masq=false", "--userland-proxy=false"),
    ]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        connection = Connection(directory / "socket")
        deadline = time.monotonic() + _UP_WITHIN
        while True:
            try:
                connection.ask("GET", "/_ping")
                break
            except OSError:
                connection.close()
                if process.poll() is not None or time.monotonic() > deadline:
                    tail = (directory / "log").read_text().strip().splitlines()[-1:]
                    raise RuntimeError(f"dockerd cannot run here: {tail}") from None
                time.sleep(0.1)
        yield connection
        connection.close()
    finally:
        process.terminate()
        process.wait()


@dataclass(slots=True)
class Verbs:
    """What one side does to make a root file system, mount it once, and remove it again."""

    create: Callable[[str], str]
    mount: Callable[[str], object]
    remove: Callable[[str], object]
    ids: list[str] = field(default_factory=list)
    numbers: "count[int]" = field(default_factory=count)

    def create_next(self) -> None:
        """One more."""
        self.ids.append(self.create(f"layer{next(self.numbers)}"))

    def mount_last(self) -> None:
        """Mount and unmount."""
        self.mount(self.ids[-1])

    def remove_last(self) -> None:
        """One less."""
        self.remove(self.ids.pop())


def of_docker(docker: Connection) -> Verbs:
    """Containers of the image `bench`."""
    made = {"Image": "bench", "Cmd": ["true"], "HostConfig": {"NetworkMode": "none"}}
    return Verbs(
        create=lambda id: str(docker.ask("POST", f"/containers/create?name={id}", made)["Id"]),
        mount=lambda id: docker.ask("HEAD", f"/containers/{id}/archive?path=/"),
        remove=lambda id: docker.ask("DELETE", f"/containers/{id}"),
    )


def of_aufsd(line: Line) -> Verbs:
    """Layers on the layer `base`."""

    def create(id: str) -> str:
        require_result(line.ask(request("create", id=id, parent="base")))
        return id

    def mount(id: str) -> None:
        require_result(line.ask(request("get", id=id)))
        require_result(line.ask(request("put", id=id)))

    return Verbs(create, mount, lambda id: require_result(line.ask(request("remove", id=id))))


def against_docker(bench: Bench) -> Iterator[Outcome]:
    """create, mount, remove; there are no goals for these."""
    grow(bench.work / "tree", 10)
    tar = pack(bench.work / "tree", bench.work / "image.tar")
    with (
        daemon(bench.work / "aufsd") as running,
        running.client() as client,
        closing(Line(running.socket)) as line,
    ):
        client.create("base")
        client.apply_diff("base", str(tar))
        ours = of_aufsd(line)
        if "dockerd" not in bench.peers:
            sides = {"aufsd": ours}
            yield from _verbs(bench, sides, bench.peers.missing["dockerd"])
            return
        try:
            with engine(bench.work / "docker") as docker:
                docker.ask("POST", "/images/create?fromSrc=-&repo=bench", tar.read_bytes())
                yield from _verbs(bench, {"aufsd": ours, "dockerd": of_docker(docker)}, "")
        except RuntimeError as failure:
            yield from _verbs(bench, {"aufsd": ours}, str(failure))


def _verbs(bench: Bench, sides: dict[str, Verbs], missing: str) -> Iterator[Outcome]:
    texts = {
        "create": "create a root file system on a base",
        "mount": "mount and unmount it",
        "remove": "remove it",
    }
    for verb, text in texts.items():
        measured = {
            name: partial(
                typical,
                {
                    "create": side.create_next,
                    "mount": side.mount_last,
                    "remove": side.remove_last,
                }[verb],
                _BATCH,
            )
            for name, side in sides.items()
        }
        found = interleaved(measured, bench.rounds(15))
        if "dockerd" in sides:
            yield compare(f"docker-{verb}", text, found, "dockerd")
        else:
            yield alone(f"docker-{verb}", text, found["aufsd"], note=missing)


CASES = (Case("docker", against_docker),)
