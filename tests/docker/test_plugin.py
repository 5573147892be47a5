"""Docker on aufsd: a real dockerd whose graph driver is the plugin, through kills of all three."""

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from aufsd.kernel import mountinfo, syscalls
from aufsd_client import loading
from tests.daemon import Daemon, daemon, eventually
from tests.docker.dockerd import Dockerd, alone, containerd, started

pytestmark = pytest.mark.docker

PLUGIN = Path(sys.executable).parent / "aufsd-docker-plugin"
BUSYBOX = "/bin/busybox"
QUIET = ("run", "--network", "none")


@dataclass(slots=True)
class Engine:
    """aufsd, the plugin and a dockerd, each of which can be killed and started again."""

    place: Path
    aufsd: Daemon
    stack: ExitStack
    plugin: "subprocess.Popen[bytes]" = field(init=False)
    daemon: Dockerd = field(init=False)

    @property
    def name(self) -> str:
        """What dockerd calls the driver: the name of the plugin's socket."""
        return f"aufsd-test-{os.getpid()}"

    @property
    def socket(self) -> Path:
        return Path("/run/docker/plugins") / f"{self.name}.sock"

    def start_plugin(self) -> None:
        command = [str(PLUGIN), "--socket", str(self.socket), "--aufsd", self.aufsd.socket]
        self.plugin = self.stack.enter_context(started(command, self.place))

    def start_dockerd(self) -> None:
        made = alone(self.place / "data", self.place, self.name, "--experimental")
        self.daemon = self.stack.enter_context(made)

    def __call__(self, *arguments: str) -> str:
        return self.daemon(*arguments)

    def references(self) -> dict[str, int]:
        with self.aufsd.client() as client:
            return {row.id: row.references for row in client.mounts().mounts}

    def layers(self) -> list[str]:
        with self.aufsd.client() as client:
            return [row.id for row in client.list().layers]


@contextmanager
def _short() -> Iterator[str]:
    """A directory; a dockerd that was killed leaves mounts in it."""
    with tempfile.TemporaryDirectory(prefix="d") as place:
        try:
            yield place
        finally:
            for row in reversed(mountinfo.mounted_under(place)):
                syscalls.umount2(row.mount_point, syscalls.MNT_DETACH)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Sockets want a short path, so not below pytest's own directory."""
    with _short() as place, ExitStack() as stack:
        (Path(place) / "a").mkdir()
        aufsd = stack.enter_context(daemon(Path(place) / "a", "--sync", "none"))
        made = Engine(Path(place), aufsd, stack)
        made.start_plugin()
        stack.enter_context(containerd(Path(place)))
        made.start_dockerd()
        _import(made, Path(place))
        yield made


def _import(engine: Engine, place: Path) -> None:
    archive = place / "base.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(BUSYBOX, "bin/busybox")
        for applet in ("sh", "cat", "rm", "mkdir", "sleep", "ls"):
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname, link.mode = tarfile.SYMTYPE, "busybox", 0o777
            tar.addfile(link)
        for name in ("etc/motd", "gone/file"):
            tar.addfile(tarfile.TarInfo(name))
    engine("import", "-c", 'CMD ["/bin/sh"]', str(archive), "base:1")


def run(engine: Engine, image: str, command: str, *flags: str) -> str:
    return engine(*QUIET, *flags, image, "/bin/sh", "-c", command)


def test_dockerd_shows_the_rows_of_the_store(engine: Engine) -> None:
    shown = engine("info")
    assert f"Storage Driver: {engine.name}" in shown
    assert "Dirperm1 Supported:" in shown
    assert "Backend: overlay" in shown


def test_what_a_container_changed_is_an_image(engine: Engine) -> None:
    run(
        engine,
        "base:1",
        "rm -r /gone; mkdir /new; echo n >/new/f; echo x >>/etc/motd",
        "--name=changed",
    )
    assert set(engine("diff", "changed").splitlines()) >= {
        "D /gone",
        "A /new",
        "A /new/f",
        "C /etc/motd",
    }
    engine("commit", "changed", "made:1")
    engine("rm", "changed")
    with pytest.raises(AssertionError, match="No such file"):
        run(engine, "made:1", "cat /gone/file", "--rm")
    assert run(engine, "made:1", "cat /new/f", "--rm") == "n"
    engine("rmi", "made:1")


def test_an_image_is_built_saved_removed_and_loaded_with_its_id(
    engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("copied")
    (tmp_path / "Dockerfile").write_text(
        "FROM base:1\nCOPY file /d/file\nRUN echo hello >/hello && rm -r /gone\nENV A=b\n"
    )
    environment = {**os.environ, "DOCKER_BUILDKIT": "0", "DOCKER_HOST": engine.daemon.address}
    command = ["docker", "build", "-q", "--network", "none", "-t", "built", str(tmp_path)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    id = engine("inspect", "-f", "{{.Id}}", "built")
    engine("save", "built", "-o", str(tmp_path / "built.tar"))
    with engine.aufsd.client() as client:
        # what Docker saved is an image to us too, with the layers that its tar has
        with client.mounted(loading.load(client, str(tmp_path / "built.tar")).layer) as root:
            assert Path(root, "hello").read_text() == "hello\n"
            assert not Path(root, "gone").exists()
        for row in sorted(client.iter_layers(prefix="sha256-"), key=lambda row: -row.depth):
            assert client.remove(row.id).removed
    before = len(engine.layers())
    engine("rmi", "-f", "built")
    assert len(engine.layers()) < before
    engine("load", "-i", str(tmp_path / "built.tar"))
    assert engine("inspect", "-f", "{{.Id}}", "built") == id
    assert run(engine, "built", "cat /hello /d/file; echo $A", "--rm") == "hello\ncopiedb"
    engine("rmi", "-f", "built")


def test_what_is_removed_leaves_no_layer_and_no_reference(engine: Engine) -> None:
    before = engine.layers()
    for number in range(3):
        run(engine, "base:1", "echo x >/x", f"--name=r{number}")
        engine("commit", f"r{number}", f"r{number}:1")
    assert len(engine.layers()) > len(before)
    for number in range(3):
        engine("rm", f"r{number}")
        engine("rmi", f"r{number}:1")
    assert engine.layers() == before
    assert engine.references() == {}


def test_a_file_goes_in_and_out_of_a_stopped_container(engine: Engine, tmp_path: Path) -> None:
    engine("create", "--network", "none", "--name=cp", "base:1")
    (tmp_path / "in").write_text("there and back")
    engine("cp", str(tmp_path / "in"), "cp:/etc/in")
    engine("cp", "cp:/etc/in", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "there and back"
    engine("rm", "cp")
    assert engine.references() == {}


def kill_plugin(engine: Engine) -> None:
    engine.plugin.kill()
    engine.plugin.wait()
    engine.start_plugin()


def kill_aufsd(engine: Engine) -> None:
    engine.aufsd.kill()
    engine.aufsd.start()


def kill_dockerd(engine: Engine) -> None:
    pid = int((engine.place / "pid").read_text())
    os.kill(pid, 9)
    eventually(lambda: not Path(f"/proc/{pid}/exe").exists())
    (engine.place / "pid").unlink()
    engine.start_dockerd()


@pytest.mark.parametrize("kill", [kill_plugin, kill_aufsd, kill_dockerd])
def test_a_kill_beside_a_running_container_leaks_nothing(
    engine: Engine, kill: Callable[[Engine], None]
) -> None:
    run(engine, "base:1", "sleep 1000", "-d", "--name=long")
    assert list(engine.references().values()) == [1]
    kill(engine)
    assert run(engine, "base:1", "echo alive", "--rm") == "alive"
    engine("start", "long")
    assert list(engine.references().values()) == [1]
    engine("rm", "-f", "long")
    assert engine.references() == {}


def test_a_layer_that_is_unmounted_from_outside_is_mounted_again(engine: Engine) -> None:
    engine("create", "--network", "none", "--name=unmounted", "base:1", "/bin/cat", "/etc/motd")
    with engine.aufsd.client() as client:
        client.cleanup()
    engine("start", "-a", "unmounted")
    engine("rm", "unmounted")
    assert engine.references() == {}


def test_an_error_reaches_the_user_in_our_words(engine: Engine) -> None:
    with engine.aufsd.client() as client:
        before = set(engine.layers())
        engine("create", "--network", "none", "--name=held", "base:1")
        (made,) = [id for id in set(engine.layers()) - before if not id.endswith("-init")]
        client.get(made)
        with pytest.raises(AssertionError, match="1 references"):
            engine("rm", "held")
        client.put(made)
    engine("rm", "-f", "held")
    assert engine.references() == {}
