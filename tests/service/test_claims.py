"""Calls for one layer that meet: each is answered as if it were before or after the others."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from aufsd import results
from aufsd.active import clearing
from aufsd.config import Config
from aufsd.daemon import open_driver
from aufsd.driver import Driver
from aufsd.kernel import btrfs
from aufsd.root import open_root
from aufsd.service.metrics import Metrics
from aufsd.store import creation, removal
from aufsd.store.dialect import Dialect
from aufsd.store.ids import LayerId
from aufsd.tasks import Tasks
from aufsd_client.errors import AufsdError, LayerNotFound
from tests import driving
from tests.archives import tar
from tests.driving import BASE, NEW, TOP, create, opened

pytestmark = pytest.mark.service

SIDE = LayerId("side")


async def test_the_second_of_two_removes_finds_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver, trio.open_nursery() as nursery:
        found = []

        async def remove() -> None:
            found.append(await driver.remove(TOP, force=False))

        for _ in range(3):
            nursery.start_soon(remove)
    assert sorted(each.removed for each in found) == [False, False, True]
    assert {each.reason for each in found if not each.removed} == {"not-found"}


async def test_a_layer_that_goes_is_there_or_not_there_and_never_damaged(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver:
        seen = set()

        async def ask(id: LayerId) -> None:
            try:
                await driver.get_metadata(id)
            except AufsdError as error:
                seen.add(type(error))

        for number in range(10):
            id = LayerId(f"layer{number}")
            await create(driver, id, BASE)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, id)
                nursery.start_soon(partial(driver.remove, id, force=False))
                for _ in range(5):
                    nursery.start_soon(ask, id)
        assert seen <= {LayerNotFound}


async def test_what_waited_for_a_layer_sees_the_one_that_is_there_then(tmp_path: Path) -> None:
    """The same id, removed and made anew on another parent while three calls wait for it."""
    async with opened(tmp_path) as driver, trio.open_nursery() as nursery:
        store, table = driver.store, driver.active.table
        await create(driver, SIDE, None)
        Path(store.layout.content(SIDE), "side").touch()
        Path(store.layout.content(BASE), "base").touch()
        found: list[object] = []

        async def changes() -> None:
            answer = await driver.changes(TOP, parent=BASE, after="", limit=100)
            found.append([(change.kind, change.path) for change in answer.changes])

        async def size() -> None:
            found.append((await driver.diff_size(TOP, parent=BASE)).size)

        async def get() -> None:
            got = await driving.get(driver, TOP)
            found.append(os.listdir(got.path))

        async with clearing.removing(driver.active, TOP, force=False):
            for call in (changes, size, get):
                nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            driver.chains.forget(TOP)
            removal.remove_on_disk(store, TOP)
            store.forget(TOP)
            store.register(TOP, SIDE)
            creation.create_on_disk(store, TOP, (SIDE,), {"trusted.aufsd.dialect": b"overlay"})
        with trio.fail_after(30):
            while len(found) < 3:
                await trio.sleep(0.01)
        assert table.in_transition(TOP) is None
    assert sorted(next(each for each in found if isinstance(each, list) and len(each) == 2)) == [
        ("add", "/side"),
        ("delete", "/base"),
    ]
    assert 0 in found
    assert ["side"] in found


async def test_a_question_about_a_layer_that_is_being_made_refuses_no_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What looks damaged is looked at again; an apply that comes meanwhile waits for that."""
    async with opened(tmp_path) as driver, trio.open_nursery() as nursery:
        content = Path(driver.store.layout.content(TOP))
        content.rename(tmp_path / "aside")
        run, looks = driver.disk.run, 0

        async def counted(*args: object, **named: object) -> object:
            nonlocal looks
            looks += args[0] == driver.chains.dialect
            if looks == 2:
                (tmp_path / "aside").rename(content)
                nursery.start_soon(driving.apply, driver, tmp_path, b"x")
                await trio.testing.wait_all_tasks_blocked()
                looks += 1
            return await run(*args, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(type(driver.disk), "run", staticmethod(counted))
        assert (await driver.get_metadata(TOP)).metadata["id"] == TOP
    assert looks >= 3
    assert (content / "file").exists()


async def until_claimed(driver: Driver, id: LayerId) -> None:
    with trio.fail_after(30):
        while driver.active.table.in_transition(id) is None:
            await trio.sleep(0.001)


@pytest.mark.parametrize("id", [NEW, TOP])
async def test_a_get_that_waited_for_an_apply_takes_its_record_back(
    tmp_path: Path, id: LayerId
) -> None:
    async with opened(tmp_path) as driver:
        await create(driver, NEW, None)
        await driving.get(driver, id)
        await driving.put(driver, id)
        read, write = os.pipe()
        got = []

        async def get() -> None:
            got.append(await driving.get(driver, id))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                lambda: driver.apply_diff(id, parent=None, source=read, digest=False)
            )
            await until_claimed(driver, id)
            nursery.start_soon(get)
            await trio.testing.wait_all_tasks_blocked()
            os.write(write, tar({"applied": b"x"}))
            os.close(write)
        os.close(read)
        assert driver.store.recorded(id) == "", "who was given it may write"
        Path(got[0].path, "applied").write_bytes(b"changed")
        await driving.put(driver, id)
        assert (await driver.check(id=None, deep=True, repair=False)).problems == []


async def test_a_get_waits_for_who_reads_a_branch_that_it_has_to_convert(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver:
        await driver.convert(BASE, to=Dialect.AUFS)
        table, got = driver.active.table, []

        async def get() -> None:
            got.append(await driving.get(driver, TOP))

        async with trio.open_nursery() as nursery, table.reading(lambda: ((BASE,),)):
            nursery.start_soon(get)
            await until_claimed(driver, BASE)
            await trio.testing.wait_all_tasks_blocked()
            assert got == []
            assert driver.store.dialect(BASE) is Dialect.AUFS
        assert got[0].mounted
        assert driver.store.dialect(BASE) is Dialect.OVERLAY


async def test_a_check_beside_creates_and_removes_ends_and_finds_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver, trio.open_nursery() as nursery:
        rounds = 0

        async def others(number: int) -> None:
            nonlocal rounds
            while True:
                id = LayerId(f"layer{number}")
                await create(driver, id, BASE)
                await driver.remove(id, force=False)
                rounds += 1
                # calls come in from sockets: whoever waited for the last one is before the next
                await trio.lowlevel.checkpoint()

        for number in range(3):
            nursery.start_soon(others, number)
        checks = 0
        while checks < 8 or rounds < 8:
            assert (await driver.check(id=None, deep=False, repair=False)).problems == []
            checks += 1
        nursery.cancel_scope.cancel()


# --- snapshots --------------------------------------------------------------------------------


@asynccontextmanager
async def on_snapshots(state: Path, root: Path) -> AsyncIterator[Driver]:
    config = Config(root=str(root), state_dir=str(state), backend="btrfs", sync="none")
    store = open_root(config)
    try:
        async with open_driver(store, config, Metrics(), Tasks()) as driver:
            yield driver
    finally:
        store.close()


def is_frozen(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return btrfs.is_read_only(fd)
    finally:
        os.close(fd)


@pytest.mark.btrfs
@pytest.mark.parametrize("first", ["get", "child"])
@pytest.mark.parametrize("what", ["create", "remove"])
async def test_what_get_says_of_a_snapshot_is_what_it_is(
    tmp_path: Path, on_btrfs: Path, first: str, what: str
) -> None:
    """`get` beside create or remove of the only child."""
    async with on_snapshots(tmp_path / "run", on_btrfs / "store") as driver:
        for number in range(10):
            parent, child = LayerId(f"parent{number}"), LayerId(f"child{number}")
            await create(driver, parent, None)
            if what == "remove":
                await create(driver, child, parent)
            got: list[results.Got] = []
            warnings: list[str] = []

            async def get(id: LayerId = parent, got: list[results.Got] = got) -> None:
                got.append(await driving.get(driver, id))

            async def change(
                id: LayerId = child, above: LayerId = parent, told: list[str] = warnings
            ) -> None:
                if what == "remove":
                    await driver.remove(id, force=False)
                else:
                    made = await driver.create(id, parent=above, mount_label="", storage_opt={})
                    told += made.warnings

            async with trio.open_nursery() as nursery:
                for call in (get, change) if first == "get" else (change, get):
                    nursery.start_soon(call)
            (answer,) = got
            assert answer.read_only == is_frozen(answer.path)
            if what == "create":
                assert answer.read_only == (not warnings), "who may be written to is told"
            # the next one counts the same, whatever came meanwhile
            await get()
            assert got[1].read_only == is_frozen(got[1].path)
