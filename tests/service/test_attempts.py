"""fork, log and attempt: what the clients make of checkpoints."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from aufsd_client import Client, errors
from aufsd_client.asyncio import Client as AsyncioClient
from aufsd_client.cli.__main__ import run
from aufsd_client.trio import Client as TrioClient
from tests.archives import tar
from tests.daemon import Daemon, daemon

pytestmark = pytest.mark.service


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with `top` on `base`, mounted."""
    with daemon(tmp_path) as made:
        with made.client() as client:
            client.create("base")
            client.apply_diff("base", tar({"f": b"f"}))
            client.create("top", parent="base")
            client.get("top")
        yield made


@pytest.fixture
def path(client: Client) -> Path:
    return Path(client.get_metadata("top").metadata["path"])


def test_checkpoints_without_a_name_are_numbered(client: Client) -> None:
    client.create("top.x")
    names = [client.checkpoint_next("top").parent for _ in range(11)]
    assert names == [f"top.{n}" for n in range(1, 12)]
    client.checkpoint("top", "top.20")
    assert client.checkpoint_next("top").parent == "top.21"
    long = "x" * 200
    client.create(long)
    assert client.checkpoint_next(long).parent == "x" * 188 + ".1"


def test_a_fork_goes_on_by_itself(client: Client, path: Path) -> None:
    (path / "both").write_text("1")
    made = client.fork("top", "other")
    assert (made.parent, made.references) == ("top.1", 1)
    (path / "both").write_text("2")
    with client.mounted("other") as other:
        assert Path(other, "both").read_text() == "1"
        Path(other, "own").touch()
    assert not (path / "own").exists()
    before = client.list().layers
    with pytest.raises(errors.LayerExists):
        client.fork("top", "other")
    assert client.list().layers == before


def test_a_log_is_the_chain_newest_first(served: Daemon, client: Client, path: Path) -> None:
    began = time.time()
    for number in range(3):
        (path / f"f{number}").write_bytes(b"x" * 100_000)
        client.checkpoint_next("top")
    rows = client.log("top")
    assert [row.id for row in rows] == ["top", "top.3", "top.2", "top.1", "base"]
    assert [row.sealed for row in rows] == [False, True, True, True, False]
    assert [row.references for row in rows] == [1, 0, 0, 0, 0]
    assert all(row.size >= 100_000 for row in rows[1:4])
    times = [row.created for row in rows[1:4]]
    assert times == sorted(times, reverse=True)
    assert began - 0.1 < times[-1] < times[0] < time.time() + 0.1
    served.kill()
    served.start()
    with served.client() as again:
        assert again.log("top") == rows


def test_the_command_prints_the_log(
    served: Daemon, client: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    client.checkpoint_next("top")
    assert run(["--socket", client.path, "log", "top"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["LAYER", "CREATED", "SIZE", "STATE"]
    assert [line.split()[0] for line in lines[1:]] == ["top", "top.1", "base"]
    assert "in use (1)" in lines[1]


def test_an_attempt_that_fails_leaves_nothing(client: Client, path: Path) -> None:
    (path / "before").touch()
    with client.attempt("top") as name:
        (path / "kept").touch()
    assert name == "top.1"

    def fail() -> None:
        with client.attempt("top", "mine") as name:
            assert name == "mine"
            (path / "kept").unlink()
            (path / "lost").touch()
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert sorted(each.name for each in path.iterdir()) == ["before", "f", "kept"]


async def _attempted(client: AsyncioClient | TrioClient, path: Path) -> None:
    async def fail() -> None:
        async with client.attempt("top"):
            (path / "lost").touch()
            raise ValueError("no")

    async with client.attempt("top"):
        (path / "kept").touch()
    with pytest.raises(ValueError, match="no"):
        await fail()
    await client.fork("top", "other")
    rows = await client.log("other")
    assert [row.id for row in rows] == ["other", "top.3", "top.2", "top.1", "base"]
    assert sorted(each.name for each in path.iterdir()) == ["f", "kept"]


def test_the_same_with_trio_and_when_cancelled(served: Daemon, client: Client, path: Path) -> None:
    async def work() -> None:
        async with TrioClient(client.path) as awaited:
            await _attempted(awaited, path)
            with trio.move_on_after(0.2) as scope:
                async with awaited.attempt("top"):
                    (path / "lost").touch()
                    await trio.sleep_forever()
            assert scope.cancelled_caught
            assert not (path / "lost").exists()

    trio.run(work)


def test_the_same_with_asyncio_and_when_cancelled(
    served: Daemon, client: Client, path: Path
) -> None:
    async def forever(awaited: AsyncioClient) -> None:
        async with awaited.attempt("top"):
            (path / "lost").touch()
            await asyncio.sleep(60)

    async def work() -> None:
        async with AsyncioClient(client.path) as awaited:
            await _attempted(awaited, path)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(forever(awaited), 0.2)
            assert not (path / "lost").exists()

    asyncio.run(work())
