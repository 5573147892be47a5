"""What a union keeps outside of its branch cannot be written there: nothing is lost, all is told.

Only aufs has such a thing, pseudo-links; tests/service/test_aufs_full.py has the real ones. Here
the kernel need not have aufs: the union is one of overlayfs, and a flush fails with a given errno.
"""

import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from aufsd.active import clearing
from aufsd.driver import Driver
from aufsd.kernel import mountinfo, syscalls
from aufsd.union import plink
from aufsd.union.backend import NotFlushed
from aufsd_client.errors import AufsdError, LayerInUse, NoSpace, UnmountBusy
from tests import driving
from tests.driving import NEW, TOP, create, opened

pytestmark = pytest.mark.service

Fail = Callable[[int], None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Has every flush fail from now on, with this errno; 0: none."""
    now = 0

    def flush(target: str) -> int:
        if now:
            raise NotFlushed(OSError(now, os.strerror(now)), ("/a", "/b"), 2)
        return 0

    def unmount(target: str, *, flush: bool = True) -> None:
        if flush:
            plink.flush(target)
        syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW)

    def set_errno(number: int) -> None:
        nonlocal now
        now = number

    monkeypatch.setattr(plink, "flush", flush)
    monkeypatch.setattr(plink, "unmount", unmount)
    return set_errno


@pytest.fixture
async def driver(
    tmp_path: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Driver]:
    """`top` is mounted, with one reference."""
    monkeypatch.setattr(clearing, "BUSY_RETRY", 0.01)
    async with opened(tmp_path) as driver:
        await driving.get(driver, TOP)
        yield driver
        fail(0)


def is_mounted(driver: Driver) -> bool:
    return mountinfo.is_mount_point(driver.store.layout.mount_point(TOP))


def mounts_check(driver: Driver) -> tuple[str, str]:
    (check,) = [each for each in driver.health().checks if each.name == "mounts"]
    return check.status, check.detail


ERRORS = pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EIO, UnmountBusy),
        (errno.EROFS, UnmountBusy),
        # of the flush they do not mean that nothing is mounted, nor that it is busy
        (errno.EINVAL, UnmountBusy),
        (errno.ENOENT, UnmountBusy),
        (errno.EBUSY, UnmountBusy),
    ],
    ids=lambda each: errno.errorcode[each] if isinstance(each, int) else "",
)


@ERRORS
async def test_a_put_that_would_lose_something_keeps_the_mount_and_says_why(
    number: int, kind: type[AufsdError], driver: Driver, fail: Fail
) -> None:
    fail(number)
    with pytest.raises(kind, match=r"2 hard links \(/a, /b\) cannot be made") as caught:
        await driving.put(driver, TOP)
    name = errno.errorcode[number]
    assert os.strerror(number) in caught.value.message
    assert caught.value.data["errno"] == name
    assert caught.value.data["names"] == ["/a", "/b"]
    assert is_mounted(driver)
    assert [(row.references, row.mounted) for row in driver.mounts().mounts] == [(0, True)]
    assert mounts_check(driver) == (
        "degraded",
        f"1 mounts stand though no reference is left: {TOP} ({name})",
    )


async def test_it_is_tried_again_in_the_background(driver: Driver, fail: Fail) -> None:
    fail(errno.ENOSPC)
    with pytest.raises(NoSpace):
        await driving.put(driver, TOP)
    calls = driver.active.thread.calls
    with trio.fail_after(30):
        while driver.active.thread.calls < calls + 3:
            assert is_mounted(driver)
            await trio.sleep(0.01)
        fail(0)
        while TOP in driver.active.table.entries:
            await trio.sleep(0.01)
    assert not is_mounted(driver)
    assert driver.health().status == "ok"


async def test_it_can_be_got_again_meanwhile(driver: Driver, fail: Fail) -> None:
    fail(errno.ENOSPC)
    with pytest.raises(NoSpace):
        await driving.put(driver, TOP)
    got = await driving.get(driver, TOP)
    assert (got.references, got.mounted) == (1, True)
    assert mounts_check(driver)[0] == "ok"


async def test_cleanup_names_it_and_goes_on(driver: Driver, fail: Fail) -> None:
    fail(errno.ENOSPC)
    cleaned = await driver.cleanup()
    assert [(row.id, row.errno, row.holders) for row in cleaned.failed] == [(TOP, "ENOSPC", [])]
    assert is_mounted(driver)
    fail(0)
    await driver.cleanup()
    # by this call or by the background, which tries again too
    assert not is_mounted(driver)


async def test_a_layer_can_be_removed_all_the_same(driver: Driver, fail: Fail) -> None:
    """Its content goes, so nothing of it has to be kept; on a full disk that is the way out."""
    fail(errno.ENOSPC)
    removed = await driver.remove(TOP, force=True)
    assert removed.removed
    assert driver.mounts().mounts == []


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, NoSpace), (errno.EIO, LayerInUse)], ids=["ENOSPC", "EIO"]
)
async def test_what_reads_the_content_of_a_mounted_layer_fails_and_says_why(
    number: int, kind: type[AufsdError], driver: Driver, fail: Fail
) -> None:
    """Else it would see old content: an export, a comparison, a union of a child."""
    await create(driver, NEW, TOP)
    fail(number)
    with Path(os.devnull).open("wb") as out:
        for _ in range(2):
            with pytest.raises(kind, match="is not whole"):
                await driver.diff(TOP, parent=None, out=out.fileno(), digest=False)
    with pytest.raises(kind):
        await driver.changes(TOP, parent=None, after="", limit=10)
    with pytest.raises(kind):
        await driving.get(driver, NEW)
    assert NEW not in driver.active.table.entries
    fail(0)
    assert (await driving.get(driver, NEW)).references == 1


async def test_an_unmount_that_fails_for_another_reason_says_which(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EINVAL is what umount2(2) says of a locked mount too, and not only of what is none."""

    def refused(target: str, *, flush: bool = True) -> None:
        raise OSError(number, os.strerror(number), target)

    monkeypatch.setattr(plink, "unmount", refused)
    for number in (errno.EPERM, errno.EINVAL):
        with pytest.raises(UnmountBusy, match=os.strerror(number)) as caught:
            await driving.put(driver, TOP)
        assert caught.value.data["errno"] == errno.errorcode[number]
        assert is_mounted(driver)
    monkeypatch.undo()
    await driving.put(driver, TOP)
    assert not is_mounted(driver)
