"""Which backend serves a store: real file systems under it, real probes."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import pytest

from aufsd.kernel import probe, syscalls
from aufsd.store.layout import Layout
from aufsd.union import causes
from aufsd.union.backend import Backend, Verdict
from aufsd.union.choice import PROBES, UNTRIED, choose, survey
from aufsd_client.errors import BackendUnsupported, IncompatibleFilesystem
from tests.btrfs import btrfs_at
from tests.fuse_server import serving
from tests.small import filled
from tests.tiers import OFF

pytestmark = pytest.mark.mounts
HAS_AUFS = "aufs" in probe.filesystems()


@contextmanager
def mounted(target: Path, fstype: str, data: str = "", flags: int = 0) -> Iterator[str]:
    target.mkdir(exist_ok=True)
    syscalls.mount("none", str(target), fstype, flags, data)
    try:
        yield str(target)
    finally:
        syscalls.umount2(str(target))


def test_auto_takes_aufs_where_the_kernel_has_it_and_else_overlay(tmp_path: Path) -> None:
    choice = choose("auto", "", Layout(str(tmp_path)))
    assert choice.backend.name == ("aufs" if HAS_AUFS else "overlay")
    assert choice.warnings == ()


def test_auto_stays_with_the_backend_that_the_store_had(tmp_path: Path) -> None:
    choice = choose("auto", "overlay", Layout(str(tmp_path)))
    assert choice.backend.name == "overlay"
    assert choice.warnings == ()


@pytest.mark.skipif(HAS_AUFS, reason="this kernel has aufs")
def test_auto_leaves_a_backend_that_cannot_load_and_says_so(tmp_path: Path) -> None:
    choice = choose("auto", "aufs", Layout(str(tmp_path)))
    assert choice.backend.name == "overlay"
    (warning,) = choice.warnings
    assert "last served by aufs" in warning
    assert "this kernel has no aufs (" in warning


@pytest.mark.skipif(HAS_AUFS, reason="this kernel has aufs")
def test_a_backend_that_the_kernel_lacks_is_unsupported_and_modprobe_was_tried(
    tmp_path: Path,
) -> None:
    with pytest.raises(BackendUnsupported, match="this kernel has no aufs") as caught:
        choose("aufs", "", Layout(str(tmp_path)))
    reasons = caught.value.data["reasons"]
    assert isinstance(reasons, dict)
    assert list(reasons) == ["aufs"]
    assert "modprobe" in reasons["aufs"] or "host's root" in reasons["aufs"]


def test_a_store_on_overlayfs_is_left_to_fuse_overlayfs(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    data = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    with mounted(tmp_path / "store", "overlay", data) as store:
        try:
            assert choose("auto", "", Layout(store)).backend.name == "fuse-overlayfs"
        except (IncompatibleFilesystem, BackendUnsupported) as error:
            # where that is not installed, or its device not ours to open
            reasons = error.data["reasons"]
            assert isinstance(reasons, dict)
            assert "lies on overlayfs" in reasons["overlay"]
            assert any(why in reasons["fuse-overlayfs"] for why in ("not installed", "/dev/fuse"))


def test_overlay_alone_on_overlayfs_is_an_incompatible_file_system(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    data = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    with (
        mounted(tmp_path / "store", "overlay", data) as store,
        pytest.raises(IncompatibleFilesystem, match="lies on overlayfs"),
    ):
        choose("overlay", "", Layout(store))


@pytest.mark.parametrize("name", [name for name in PROBES if name != "btrfs"])
def test_a_store_on_tmpfs_can_be_served(name: str, tmp_path: Path) -> None:
    if OFF.get({"fuse-overlayfs": "fuse"}.get(name, name)):
        pytest.skip(f"{name} is not here")
    with mounted(tmp_path / "store", "tmpfs") as store:
        assert choose(name, "", Layout(store)).backend.name == name


@pytest.mark.btrfs
def test_auto_takes_btrfs_on_btrfs_for_a_new_store(on_btrfs: Path) -> None:
    choice = choose("auto", "", Layout(str(on_btrfs)))
    assert (choice.backend.name, choice.warnings) == ("btrfs", ())
    assert "the store lies on btrfs" in choice.why
    assert choose("btrfs", "", Layout(str(on_btrfs))).why == ""
    assert choose("overlay", "", Layout(str(on_btrfs))).backend.name == "overlay"
    # it stays what it is, also before the first layer
    assert choose("auto", "overlay", Layout(str(on_btrfs))).backend.name == "overlay"


@pytest.mark.btrfs
@pytest.mark.parametrize("prior", ["", "overlay", "aufs"])
def test_layers_made_for_unions_are_not_for_btrfs(on_btrfs: Path, prior: str) -> None:
    (on_btrfs / "layers").mkdir()
    (on_btrfs / "layers/base").touch()
    assert choose("auto", prior, Layout(str(on_btrfs))).backend.name != "btrfs"
    with pytest.raises(IncompatibleFilesystem, match="made for unions"):
        choose("btrfs", prior, Layout(str(on_btrfs)))


@pytest.mark.btrfs
@pytest.mark.parametrize("name", [name for name in PROBES if name != "btrfs"])
def test_snapshots_are_for_btrfs_alone(on_btrfs: Path, name: str) -> None:
    (on_btrfs / "layers").mkdir()
    (on_btrfs / "layers/base").touch()
    assert choose("auto", "btrfs", Layout(str(on_btrfs))).backend.name == "btrfs"
    with pytest.raises(IncompatibleFilesystem, match="only btrfs can serve"):
        choose(name, "btrfs", Layout(str(on_btrfs)))


def test_btrfs_elsewhere_is_an_incompatible_file_system(tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "store", "tmpfs") as store,
        pytest.raises(IncompatibleFilesystem, match="the store lies on tmpfs"),
    ):
        choose("btrfs", "", Layout(store))


def test_a_read_only_store_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "store", "tmpfs", flags=syscalls.MS_RDONLY) as store,
        pytest.raises(OSError, match="Read-only file system"),
    ):
        choose("overlay", "", Layout(store))


@pytest.mark.fuse
def test_no_store_lies_where_a_rename_may_replace_something(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        for prior in ("", "overlay"):
            with pytest.raises(IncompatibleFilesystem, match="without replacing"):
                choose("auto", prior, Layout(str(tmp_path)))
        assert {
            "without replacing" in str(found) for _, found in survey(Layout(str(tmp_path)))
        } == {True}
        # the directories that a store has, and nothing in them
        assert {name for _, name in served.names} == {b".aufsd", b"probes"}


def test_no_store_lies_in_a_mount_that_archive_processes_cannot_have(tmp_path: Path) -> None:
    with mounted(tmp_path / "store", "tmpfs") as store:
        syscalls.mount("none", store, "", syscalls.MS_UNBINDABLE)
        with pytest.raises(IncompatibleFilesystem, match="make-private"):
            choose("auto", "", Layout(store))


def test_a_survey_leaves_nothing_behind(tmp_path: Path) -> None:
    found = dict(survey(Layout(str(tmp_path))))
    assert list(found) == list(PROBES)
    assert isinstance(found["aufs"], str) != HAS_AUFS
    assert os.listdir(tmp_path) == []


@pytest.mark.userns
def test_an_unprivileged_user_is_served_through_user_xattrs(tmp_path: Path) -> None:
    """In a user namespace, where trusted.* cannot be written (Linux 5.11)."""
    script = """
from aufsd.union.choice import choose
from aufsd.store.layout import Layout
import sys
backend = choose("auto", "", Layout(sys.argv[1])).backend
print(backend.name, backend.namespace, *backend.options)
"""
    done = subprocess.run(
        [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            sys.executable,
            "-c",
            script,
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split()[:2] == ["overlay", "user"], done.stderr
    assert "userxattr" in done.stdout


def test_the_ground_of_a_store(tmp_path: Path) -> None:
    with mounted(tmp_path / "store", "tmpfs") as store:
        found = probe.ground(store)
        assert os.listdir(store) == []
    assert (found.kind, found.magic) == ("tmpfs", syscalls.TMPFS_MAGIC)
    assert found.d_type
    assert found.xattrs in ("trusted", "user")


def test_the_host_says_what_it_is() -> None:
    host = probe.host()
    assert host.kernel == os.uname().release
    assert "proc" in host.filesystems
    assert host.root == (os.geteuid() == 0)


@pytest.mark.parametrize("name", [name for name in PROBES if name != "btrfs"])
def test_on_a_full_disk_the_backend_on_record_serves_untried(name: str, tmp_path: Path) -> None:
    if OFF.get({"fuse-overlayfs": "fuse"}.get(name, name)):
        pytest.skip(f"{name} is not here")
    with mounted(tmp_path / "store", "tmpfs", "size=1m,nr_inodes=64") as store:
        layout = Layout(store)
        assert choose(name, "", layout).backend.name == name
        files = (Path(store, str(number)) for number in range(100))
        with pytest.raises(OSError, match="No space"):
            sum(file.write_bytes(b"") for file in files)
        for asked in ("auto", name):
            choice = choose(asked, name, layout)
            assert choice.backend.name == name
            (warning,) = choice.warnings
            assert warning.startswith(f"{name} could not be tried out (")
            assert "No space left on device" in warning
        # nothing is known of a new store
        with pytest.raises((BackendUnsupported, OSError)):
            choose(name, "", layout)


@pytest.mark.btrfs
def test_the_trial_is_left_out_only_where_the_file_system_is_the_one_on_record(
    on_btrfs: Path,
) -> None:
    assert not isinstance(UNTRIED["btrfs"](Layout(str(on_btrfs)), "trusted"), Verdict)
    found = UNTRIED["btrfs"](Layout("/proc"), "trusted")
    assert isinstance(found, Verdict)
    assert found.incompatible


@pytest.mark.btrfs
def test_on_a_full_btrfs_it_serves_untried_too(tmp_path: Path) -> None:
    with btrfs_at(tmp_path) as disk:
        layout = Layout(str(disk))
        assert choose("btrfs", "", layout).backend.name == "btrfs"
        with filled(disk):
            # what is no data has room longer
            names = (disk / f"{number}-{'x' * 200}" for number in range(1 << 20))
            with pytest.raises(OSError, match="No space"):
                sum(name.write_bytes(b"x" * 1024) for name in names)
            choice = choose("auto", "btrfs", layout)
    assert choice.backend.name == "btrfs"


@contextmanager
def descriptors(free: int) -> Iterator[None]:
    """Inside, so many more descriptors can be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as opened:
        # what is free below the highest in use
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        null = os.open("/dev/null", os.O_RDONLY)
        opened.callback(os.close, null)
        while (fd := os.dup(null)) < highest:
            opened.callback(os.close, fd)
        opened.callback(os.close, fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fd, highest) + 1 + free, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", [name for name in PROBES if name != "btrfs"])
def test_without_descriptors_no_other_backend_takes_the_place_of_the_one_on_record(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also aufs where there is none: that modprobe cannot be run says nothing of the kernel."""
    answers: list[str] = []
    load_module = probe.load_module

    def load(module: str) -> str:
        answers.append("")
        answers[-1] = load_module(module)
        return answers[-1]

    monkeypatch.setattr(probe, "load_module", load)
    if OFF.get("fuse") and name == "fuse-overlayfs":
        pytest.skip(f"{name} is not here")
    served = set()
    for free in range(12):
        with descriptors(free):
            try:
                choice = choose("auto", name, Layout(str(tmp_path)))
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                continue
            if name == "aufs" and choice.backend.name != name:
                # the kernel was asked, and said that it has none
                assert answers[-1]
                break
        served.add(choice.backend.name)
    assert served == {name}


@pytest.mark.parametrize("passing", [True, False])
@pytest.mark.parametrize("raised", [True, False])
def test_a_trial_that_fails_once_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, passing: bool, raised: bool
) -> None:
    """A fake, for no kernel gives EIO once when it is asked to."""
    probe_overlay, tries = PROBES["overlay"], 0
    number = errno.EIO if passing else errno.ENOTTY

    def fail_once(layout: Layout) -> Backend | Verdict:
        nonlocal tries
        tries += 1
        if tries > 1:
            return probe_overlay(layout)
        if raised:
            raise OSError(number, os.strerror(number))
        return causes.refused("overlay", str(tmp_path), OSError(number, os.strerror(number)))

    monkeypatch.setitem(cast("dict[str, object]", PROBES), "overlay", fail_once)
    if passing:
        choice = choose("overlay", "", Layout(str(tmp_path)))
        assert (choice.backend.name, choice.warnings, tries) == ("overlay", (), 2)
    else:
        with pytest.raises(OSError if raised else IncompatibleFilesystem):
            choose("overlay", "overlay", Layout(str(tmp_path)))
