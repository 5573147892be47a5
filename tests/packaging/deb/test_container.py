"""The image: built by buildah, and run with what the host shares with it, or refused."""

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from aufsd.kernel import mountinfo, syscalls
from aufsd_client import Client
from aufsd_client.errors import AufsdError
from aufsd_client.wire import ConnectionLost, DaemonUnreachable
from tests.daemon import eventually
from tests.packaging.deb.mounting import mounted
from tests.packaging.deb.roots import CHECKOUT, root

pytestmark = [pytest.mark.service, pytest.mark.deb]

STORE, RUN = "/var/lib/aufsd", "/run/aufsd"
SHARED = ("--volume", f"{STORE}:{STORE}:rshared", "--volume", f"{RUN}:{RUN}")
CGROUPS = "/sys/fs/cgroup"


def run(*command: str, status: int = 0) -> str:
    """What a program says; AssertionError if it ends otherwise."""
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """Where images are kept, as options of buildah and podman; not the host's place."""
    place = tmp_path_factory.mktemp("images")
    os.environ["TMPDIR"] = str(place)
    try:
        yield (f"--root={place}/root", f"--runroot={place}/run", "--storage-driver=vfs")
    finally:
        del os.environ["TMPDIR"]
        shutil.rmtree(place)


@pytest.fixture(scope="module")
def image(storage: tuple[str, ...]) -> str:
    """The image, of Debian 12: its root is what debootstrap made."""
    packages = [*(CHECKOUT / "build/deb").glob("*.deb")]
    base = root("bookworm", packages)
    buildah = ("buildah", *storage)
    container = run(*buildah, "from", "scratch").strip()
    run(*buildah, "copy", "--quiet", container, str(base), "/")
    run(*buildah, "commit", "--quiet", "--rm", container, "localhost/base")
    options = ("--isolation=chroot", "--build-arg=BASE=localhost/base", "--tag=aufsd")
    run(*buildah, "build", *options, "--file=container/Containerfile", ".")
    return "localhost/aufsd"


@pytest.fixture
def host() -> Iterator[None]:
    """A host: this run's mount namespace, with a store and sockets that are shared."""
    with ExitStack() as stack:
        stack.enter_context(mounted("store", STORE, "tmpfs"))
        syscalls.mount("none", STORE, "", syscalls.MS_SHARED)
        stack.enter_context(mounted("run", RUN, "tmpfs"))
        # crun knows no host that has both kinds of cgroups
        if os.path.ismount(f"{CGROUPS}/unified"):
            stack.enter_context(mounted(f"{CGROUPS}/unified", CGROUPS, "", syscalls.MS_BIND))
        yield


@pytest.fixture
def podman(storage: tuple[str, ...], host: None) -> Iterator[tuple[str, ...]]:
    """The command up to its verb; afterwards no container is left."""
    command = ("podman", *storage, "--cgroup-manager=cgroupfs")
    yield command
    run(*command, "rm", "--all", "--force")


def options() -> list[str]:
    """What `podman run` is told beside the volumes: as the page says, and limits that hold here."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = (f"--ulimit=nofile={files}:{files}", "--ulimit=nproc=1000:1000", "--pids-limit=0")
    return ["--privileged", "--network=host", "--pid=host", *limits]


@pytest.mark.parametrize(
    ("volumes", "sentence"),
    [
        ((), "/var/lib/aufsd is the container's own"),
        (
            ("--volume", f"{STORE}:{STORE}", "--volume", f"{RUN}:{RUN}"),
            "what is mounted in /var/lib/aufsd would not be seen on the host",
        ),
        (SHARED[:2], "/run/aufsd is the container's own"),
    ],
    ids=["no store", "no propagation", "no sockets"],
)
def test_what_the_host_does_not_share_is_said(
    podman: tuple[str, ...], image: str, volumes: tuple[str, ...], sentence: str
) -> None:
    said = run(*podman, "run", "--rm", *options(), *volumes, image, status=4)
    assert said.startswith(f"aufsd: {sentence}")
    assert ": run it with --volume " in said
    assert os.listdir(STORE) == os.listdir(RUN) == []


def answers() -> bool:
    """Whether a daemon listens."""
    try:
        with Client(timeout=10) as client:
            client.ping()
    except (DaemonUnreachable, ConnectionLost, AufsdError):
        return False
    return True


def test_a_mount_of_the_container_is_one_of_the_host_and_outlives_it(
    podman: tuple[str, ...], image: str
) -> None:
    start = (*podman, "run", "--detach", "--name=one", *options(), *SHARED, image)
    run(*start)
    eventually(answers)
    with Client(timeout=30) as client:
        client.create("base")
        client.create("work", parent="base")
        path = client.get("work").path
    assert [row.mount_point for row in mountinfo.mounted_under(f"{STORE}/mnt")] == [path]
    Path(path, "file").write_text("kept")
    run(*podman, "stop", "one")
    # SIGTERM reached the daemon itself
    [found] = json.loads(run(*podman, "inspect", "one"))
    assert found["State"]["ExitCode"] == 0
    assert Path(path, "file").read_text() == "kept"

    run(*podman, "rm", "one")
    run(*start)
    eventually(answers)
    with Client(timeout=30) as client:
        assert client.get("work").references == 2
        client.put("work")
        assert not client.put("work").mounted
    assert mountinfo.mounted_under(f"{STORE}/mnt") == []
