"""On a full disk every call that has to write says so, and what makes room goes on."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from aufsd_client import Client, errors
from tests.archives import tar
from tests.daemon import Daemon, daemon
from tests.small import full, small

pytestmark = [pytest.mark.service, pytest.mark.mounts]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon over a store on a small file system."""
    with (
        small(tmp_path / "disk") as disk,
        daemon(tmp_path, "--backend", "overlay", root=disk / "store") as made,
    ):
        yield made


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.create("new", parent="base"),
        lambda client: client.apply_diff("base", tar({"more": b"x"})),
        lambda client: client.apply_diff("empty", tar({"more": b"x"})),
        lambda client: client.convert("base", "aufs"),
        lambda client: client.checkpoint("top", "kept"),
        lambda client: client.seal("top"),
    ],
    ids=["create", "apply again", "apply", "convert", "checkpoint", "seal"],
)
def test_a_call_that_has_to_write_is_refused_or_done_and_no_incident(
    served: Daemon, client: Client, call: Callable[[Client], object]
) -> None:
    client.create("base")
    client.apply_diff("base", tar({"file": b"content"}))
    client.create("top", parent="base")
    client.create("empty")
    with full(served.root):
        # what needs no new name may be done; any other error fails the test
        with suppress(errors.NoSpace):
            call(client)
        assert client.remove("empty").removed
    assert client.check(deep=True).problems == []
