"""References with a name: counted once, found again after a restart, put by whoever knows it."""

from collections.abc import Iterator

import pytest

from aufsd.kernel import syscalls
from aufsd_client import Client, errors
from tests.daemon import Daemon

pytestmark = pytest.mark.service


@pytest.fixture
def layers(client: Client) -> Iterator[Client]:
    client.create("base")
    client.create("top", parent="base")
    yield client
    client.remove("top", force=True)


def test_a_name_counts_once_however_often_it_is_taken(layers: Client) -> None:
    first = layers.get("top", name="engine/1")
    again = layers.get("top", name="engine/1")
    assert (first.new, first.references) == (True, 1)
    assert (again.new, again.references, again.path) == (False, 1, first.path)
    other = layers.get("top", name="engine/2")
    assert (other.new, other.references) == (True, 2)
    (row,) = layers.mounts().mounts
    assert {holder.name for holder in row.holders} == {"engine/1", "engine/2"}


def test_only_its_name_puts_it(layers: Client) -> None:
    layers.get("top", name="engine")
    with pytest.raises(errors.LayerInUse):
        layers.put("top")
    nobody = layers.put("top", name="nobody")
    assert (nobody.dropped, nobody.references, nobody.mounted) == (False, 1, True)
    mine = layers.put("top", name="engine")
    assert (mine.dropped, mine.references, mine.mounted) == (True, 0, False)
    assert not layers.put("top", name="engine").dropped


def test_a_put_without_a_name_takes_one_without(layers: Client) -> None:
    layers.get("top", name="engine")
    layers.get("top")
    assert layers.put("top").references == 1
    assert layers.put("top", name="engine").dropped


def test_what_was_unmounted_is_mounted_again_and_counts_no_more(
    served: Daemon, layers: Client
) -> None:
    path = layers.get("top", name="engine").path
    syscalls.umount2(path)
    assert served.mounts() == []
    again = layers.get("top", name="engine")
    assert (again.new, again.references) == (False, 1)
    assert served.mounts() == ["top"]


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_name_is_known_after_a_restart(served: Daemon, layers: Client, how: str) -> None:
    layers.get("top", name="engine")
    layers.get("top")
    getattr(served, how)()
    served.start()
    with served.client() as client:
        assert not client.get("top", name="engine").new
        assert client.put("top", name="engine").references == 1
        assert client.put("top").references == 0


@pytest.mark.parametrize("name", ["x" * 256, "a\nb", "\x1b[31m", "é" * 128])
def test_what_is_no_name_is_refused(layers: Client, name: str) -> None:
    with pytest.raises(errors.InvalidParams, match="printable"):
        layers.get("top", name=name)
    with pytest.raises(errors.InvalidParams, match="printable"):
        layers.put("top", name=name)


def test_a_name_does_not_end_with_a_process(layers: Client) -> None:
    with pytest.raises(errors.InvalidParams, match="hold"):
        layers.get("top", name="engine", hold="process")
