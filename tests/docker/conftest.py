"""Docker's store, unpacked once and served; each test of a module sees the same one."""

from collections.abc import Iterator

import pytest

from aufsd_client import Client
from tests.daemon import Daemon, daemon
from tests.docker import store


@pytest.fixture(scope="module", params=[pytest.param("aufs", marks=pytest.mark.aufs), "overlay"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def docker(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon over a store as Docker left it."""
    directory = tmp_path_factory.mktemp("docker")
    root = store.unpack(directory)
    with daemon(directory, "--adopt", "--backend", backend, root=root) as made:
        yield made


@pytest.fixture(scope="module")
def client(docker: Daemon) -> Iterator[Client]:
    """A client of it."""
    with docker.client() as made:
        yield made
